"""Which positions a position attends to; the shape legend is in layers.py."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from hvdlm.models.compilation import compiled

_BLOCK_POSITIONS = 128  # Flex attention skips or computes so many as one.
_SMALLEST_HEAD = 16  # Flex attention's kernels take no smaller one.


def causal_mask(before: int, x_BTD: Tensor) -> Tensor | None:
    """Mask of T positions that follow `before` cached ones.

    `is_causal` of scaled_dot_product_attention aligns a non-square mask to the top left,
    which is wrong after a cache.

    Returns:
        bool [T, S], true where attention is allowed; None where no explicit mask is needed.
    """
    positions = x_BTD.shape[1]
    if before == 0 or positions == 1:
        return None
    allowed = torch.ones(positions, before + positions, dtype=torch.bool, device=x_BTD.device)
    return allowed.tril(before)


def document_mask(positions_BT: Tensor, *, head_size: int) -> Tensor | BlockMask:
    """Mask that confines attention to what came before in the same document.

    Args:
        positions_BT: int64, of each token in its document; 0 begins one, and so does column 0.
        head_size: K.

    Returns:
        bool [B, 1, T, T], true where attention is allowed; on CUDA what flex attention takes instead, which
        skips blocks of other documents.
    """
    documents_BT = (positions_BT == 0).cumsum(1)
    # Not torch's varlen_attn: it has no fp32, and its longest document must be known on the host.
    if positions_BT.is_cuda and positions_BT.shape[1] >= _BLOCK_POSITIONS and head_size >= _SMALLEST_HEAD:
        return block_mask(documents_BT)
    return (documents_BT[:, None, :, None] == documents_BT[:, None, None, :]).tril()


def block_mask(documents_BT: Tensor) -> BlockMask:
    """The same for flex attention, from the number of each token's document (int64).

    Source: He et al., "FlexAttention", PyTorch blog, 2024, "document masking".
    """

    def allowed(b: Tensor, _: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        return (documents_BT[b, q] == documents_BT[b, kv]) & (q >= kv)

    batch, positions = documents_BT.shape
    create = compiled(create_block_mask)
    mask: BlockMask = create(allowed, batch, None, positions, positions, device=documents_BT.device)
    return mask


def attend_in_blocks(q_BHTK: Tensor, k_BGSK: Tensor, v_BGSK: Tensor, mask: BlockMask) -> Tensor:
    """Scaled dot-product attention where a block mask allows it -> [B, H, T, K]."""
    has_groups = q_BHTK.shape[1] != k_BGSK.shape[1]
    # Within a compiled block it is compiled as part of it.
    attention: Callable[..., Any] = flex_attention
    if not torch.compiler.is_compiling():
        attention = compiled(flex_attention)
    y_BHTK: Tensor = attention(q_BHTK, k_BGSK, v_BGSK, block_mask=mask, enable_gqa=has_groups)
    return y_BHTK
