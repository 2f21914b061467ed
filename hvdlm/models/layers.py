"""Layers that decoder models are made of.

Shape legend of models/ (a suffix on a tensor's name gives its shape):

    B  sequences in the batch            D  width of the residual stream
    T  positions in this call            H  attention heads
    S  positions seen so far, T of       G  key and value heads (H % G == 0)
       them in this call (S >= T)        K  size of one head
    V  vocabulary, padded                M  inner width of the MLP
"""

from __future__ import annotations

from typing import final

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask

from hvdlm.models.masks import attend_in_blocks


@final
class KVCache:
    """Keys and values of the positions read so far, for every layer; preallocated for generation."""

    def __init__(self, layers: int, shape: tuple[int, int, int, int], *, like: Tensor) -> None:
        """Allocate an empty cache.

        Args:
            layers: number of attention layers.
            shape: (B, G, positions, K); `positions` is the most the cache can hold.
            like: any tensor with the dtype and device of the keys.
        """
        self.positions = shape[2]
        self.length = 0
        self._keys = [like.new_zeros(shape) for _ in range(layers)]
        self._values = [like.new_zeros(shape) for _ in range(layers)]

    def put(self, layer: int, k_BGTK: Tensor, v_BGTK: Tensor) -> tuple[Tensor, Tensor]:
        """Store a layer's new keys and values after the ones already read.

        Returns:
            All keys and values of that layer so far, [B, G, S, K] each (views of the cache).

        Raises:
            ValueError: the cache is too small for S positions.
        """
        end = self.length + k_BGTK.shape[2]
        if end > self.positions:
            raise ValueError(f"KV cache: {end} positions do not fit into {self.positions}")
        self._keys[layer][:, :, self.length : end] = k_BGTK
        self._values[layer][:, :, self.length : end] = v_BGTK
        return self._keys[layer][:, :, :end], self._values[layer][:, :, :end]

    def advance(self, positions: int) -> None:
        """Count positions as read, after every layer has put them."""
        self.length += positions

    def clear(self) -> None:
        """Forget everything read."""
        self.length = 0


def new_linear(inputs: int, outputs: int) -> nn.Linear:
    """A bias-free linear layer whose weights are not filled yet, on the CPU (see `fill_normal_`)."""
    return nn.utils.skip_init(nn.Linear, inputs, outputs, bias=False, device="cpu")


@torch.no_grad()
def fill_normal_(weight: Tensor, std: float) -> None:
    """Fill with normal numbers drawn on the CPU, so that a seed means the same weights on every device.

    Args:
        weight: any shape, dtype and device.
        std: standard deviation.
    """
    weight.copy_(torch.randn(weight.shape, device="cpu", dtype=torch.float32) * std)


@final
class RMSNorm(nn.Module):
    """Root-mean-square normalisation with a learnt scale.

    Source: Zhang and Sennrich, "Root Mean Square Layer Normalization", 2019, eq. 4.
    """

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width, device="cpu"))

    def forward(self, x_BTD: Tensor) -> Tensor:
        """Normalise the last axis: [B, T, D] -> [B, T, D], in autocast's dtype where that is on."""
        x_BTD = F.rms_norm(x_BTD, self.weight.shape, self.weight, self.eps)
        kind = x_BTD.device.type
        # Autocast would cast the same activation again for each of the linear layers that read it.
        return x_BTD.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else x_BTD


def rotary_table(
    first: int, positions: int, *, head_size: int, theta: float, like: Tensor
) -> tuple[Tensor, Tensor]:
    """Cosines and signed sines of the rotary position embedding.

    Computed in each forward pass (some 40 us): no buffer to keep out of checkpoints, and no length limit.

    Args:
        first: position of the first row.
        positions: number of rows (T).
        head_size: K, even.
        theta: base of the frequencies.
        like: any tensor on the wanted device.

    Returns:
        Two fp32 tensors [T, 1, K]; the first half of the sines is negated for `rotate`.

    Source: Su et al., "RoFormer", 2021, eq. 34; pairs are (i, i + K/2), as in Hugging Face's Llama,
        so exported weights need no permutation.
    """
    exponents = torch.arange(0, head_size, 2, device=like.device, dtype=torch.float32) / head_size
    times = torch.arange(first, first + positions, device=like.device, dtype=torch.float32)
    angles = torch.outer(times, 1.0 / theta**exponents).unsqueeze(1)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)


def rotate(x_BTHK: Tensor, cos_T1K: Tensor, sin_T1K: Tensor) -> Tensor:
    """Turn each pair (i, i + K/2) of a head by its position's angle; shape and dtype stay.

    The tables may also be [B, T, 1, K], where positions differ between sequences.
    """
    cos_T1K, sin_T1K = cos_T1K.to(x_BTHK.dtype), sin_T1K.to(x_BTHK.dtype)
    return x_BTHK * cos_T1K + x_BTHK.roll(x_BTHK.shape[-1] // 2, -1) * sin_T1K


@final
class Attention(nn.Module):
    """Causal self-attention with rotary positions and grouped keys and values.

    Source: Ainslie et al., "GQA", 2023; head h reads group h // (H / G).
    """

    def __init__(self, width: int, heads: int, kv_heads: int) -> None:
        super().__init__()
        self.heads, self.kv_heads = heads, kv_heads
        kv_width = width // heads * kv_heads
        # Measured on a CPU: one fused matrix is not faster than three, and three shard and export plainly.
        self.query = new_linear(width, width)
        self.key = new_linear(width, kv_width)
        self.value = new_linear(width, kv_width)
        self.out = new_linear(width, width)

    def forward(
        self,
        x_BTD: Tensor,
        rotary: tuple[Tensor, Tensor],
        mask: Tensor | BlockMask | None = None,
        cache: KVCache | None = None,
        layer: int = 0,
    ) -> Tensor:
        """[B, T, D] -> [B, T, D]; with a cache also reads, and adds to, the positions before.

        Args:
            x_BTD: normalised residual stream.
            rotary: `rotary_table` of these T positions.
            mask: from `hvdlm.models.masks`; None = all T positions see those before them.
            cache: keys and values of the positions before.
            layer: this layer's index in the cache.
        """
        heads = (*x_BTD.shape[:2], -1, x_BTD.shape[-1] // self.heads)
        q_BHTK = rotate(self.query(x_BTD).view(heads), *rotary).transpose(1, 2)
        k_BGSK = rotate(self.key(x_BTD).view(heads), *rotary).transpose(1, 2)
        v_BGSK = self.value(x_BTD).view(heads).transpose(1, 2)
        if cache is not None:
            k_BGSK, v_BGSK = cache.put(layer, k_BGSK, v_BGSK)
        y_BHTK = attend(q_BHTK, k_BGSK, v_BGSK, mask=mask)
        return self.out(y_BHTK.transpose(1, 2).flatten(2))


def attend(q_BHTK: Tensor, k_BGSK: Tensor, v_BGSK: Tensor, *, mask: Tensor | BlockMask | None) -> Tensor:
    """Causal scaled dot-product attention -> [B, H, T, K].

    Args:
        q_BHTK: queries; without a mask, one position that sees all S, or T = S positions.
        k_BGSK: keys.
        v_BGSK: values.
        mask: bool, broadcasts to [B, H, T, S], true where attention is allowed; or a block mask.
    """
    if isinstance(mask, BlockMask):
        return attend_in_blocks(q_BHTK, k_BGSK, v_BGSK, mask)
    kind = q_BHTK.device.type
    if kind == "cpu":
        # At short sequences torch's CPU attention is 2.4 times slower in bf16 than in fp32 (measured, T 128).
        q_BHTK, k_BGSK, v_BGSK = q_BHTK.float(), k_BGSK.float(), v_BGSK.float()
    with torch.autocast(kind, enabled=kind != "cpu" and torch.is_autocast_enabled(kind)):
        return F.scaled_dot_product_attention(
            q_BHTK,
            k_BGSK,
            v_BGSK,
            attn_mask=mask,
            is_causal=mask is None and q_BHTK.shape[2] > 1,
            # Measured on a CPU: 5 to 10 % faster than repeating keys and values.
            enable_gqa=q_BHTK.shape[1] != k_BGSK.shape[1],
        )


@final
class SwiGLU(nn.Module):
    """Gated MLP: down(silu(gate(x)) * up(x)).

    Source: Shazeer, "GLU Variants Improve Transformer", 2020, eq. 6.
    """

    def __init__(self, width: int, inner_width: int) -> None:
        super().__init__()
        self.gate = new_linear(width, inner_width)
        self.up = new_linear(width, inner_width)
        self.down = new_linear(inner_width, width)

    def forward(self, x_BTD: Tensor) -> Tensor:
        """[B, T, D] -> [B, T, D]."""
        return self.down(F.silu(self.gate(x_BTD)) * self.up(x_BTD))
