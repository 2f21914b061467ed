"""Cross-entropy of an output projection whose logits are never there all at once.

A long batch of a large vocabulary has more logits than the model has activations: with 8192 positions and
50304 ids they take 1.5 GiB in fp32, and as much again twice before their gradient is there. Here some rows
are projected at a time; their loss and gradients are taken before the next.

The shape legend is in layers.py; N are positions of all sequences, R those of one chunk.
"""

from __future__ import annotations

from typing import Any, final

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

IGNORED_LABEL = -100
"""Label of a position that does not count (padding, masked text)."""

CHUNK_LOGITS = 2**24
"""Logits in a chunk, 64 MiB in fp32."""


def linear_cross_entropy(hidden_ND: Tensor, weight_VD: Tensor, labels_N: Tensor) -> Tensor:
    """Summed cross-entropy of the logits hidden @ weight.T.

    Args:
        hidden_ND: what the output projection reads, any floating dtype.
        weight_VD: the output projection, which may also be the embedding.
        labels_N: int64, ids below V; -100 does not count.

    Returns:
        Sum of the losses in nats, 0-d: fp32, or fp64 of fp64. Its gradient cannot be differentiated again
        where the logits take more than one chunk.
    """
    chunks = _chunk_count(len(labels_N), weight_VD)
    if chunks > 1:
        # Inside, grad mode is always off, and a parameter asks for gradients also in evaluation.
        loss: Tensor = _InChunks.apply(hidden_ND, weight_VD, labels_N, chunks, torch.is_grad_enabled())
        return loss
    logits_NV = _exact(F.linear(hidden_ND, weight_VD))
    return F.cross_entropy(logits_NV, labels_N, reduction="sum", ignore_index=IGNORED_LABEL)


def _chunk_count(rows: int, weight_VD: Tensor) -> int:
    """Chunks have `CHUNK_LOGITS`, or D rows: as large as the weight, whose gradient each adds to.

    With fewer rows, reading and writing that gradient would take longer than computing what is added.
    """
    vocab_size, width = weight_VD.shape
    return -(-rows // max(CHUNK_LOGITS // vocab_size, width))


def _exact(logits: Tensor) -> Tensor:
    """In fp32, where the dtype is not finer."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


@final
class _InChunks(torch.autograd.Function):
    """The loss, and while a chunk's logits are there, the gradients for an upstream gradient of 1.

    Source: Hsu et al., "Liger Kernel", 2024, section 3.2, "FusedLinearCrossEntropy".
    """

    @staticmethod
    def forward(
        ctx: Any, hidden_ND: Tensor, weight_VD: Tensor, labels_N: Tensor, chunks: int, with_gradients: bool
    ) -> Tensor:
        kind = hidden_ND.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight_VD.dtype
        wants = [with_gradients and needed for needed in ctx.needs_input_grad[:2]]
        grad_hidden_ND = torch.empty_like(hidden_ND) if wants[0] else None
        grad_weight_VD = torch.zeros_like(weight_VD) if wants[1] else None
        with torch.autocast(kind, enabled=False):
            # Cast once, not for each chunk.
            cast_ND, cast_VD = hidden_ND.to(dtype), weight_VD.to(dtype)
            loss = torch.zeros_like(_exact(cast_ND[0, 0]))
            begin = 0
            for hidden_RD, labels_R in zip(cast_ND.chunk(chunks), labels_N.chunk(chunks), strict=True):
                chunk_loss, log_p_RV = _loss(hidden_RD, cast_VD, labels_R)
                loss += chunk_loss
                ignored_R1 = (labels_R == IGNORED_LABEL)[:, None]
                if any(wants):
                    grad_RV = _logits_gradient(log_p_RV, labels_R, dtype)
                if grad_hidden_ND is not None:
                    rows = slice(begin, begin + len(labels_R))
                    grad_hidden_ND[rows] = (grad_RV @ cast_VD).masked_fill_(ignored_R1, 0.0)
                if grad_weight_VD is not None:
                    _add_product_(grad_weight_VD, grad_RV, hidden_RD.masked_fill(ignored_R1, 0.0))
                begin += len(labels_R)
        ctx.save_for_backward(grad_hidden_ND, grad_weight_VD)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        # Not in place: a graph that is kept may be gone through again.
        scaled = (None if grad is None else grad * upstream.to(grad.dtype) for grad in ctx.saved_tensors)
        return (*scaled, None, None, None)


def _loss(hidden_RD: Tensor, weight_VD: Tensor, labels_R: Tensor) -> tuple[Tensor, Tensor]:
    """Summed loss of a chunk, and the logarithms of its probabilities [R, V]."""
    log_p_RV = F.log_softmax(_exact(hidden_RD @ weight_VD.t()), -1)
    return F.nll_loss(log_p_RV, labels_R, reduction="sum", ignore_index=IGNORED_LABEL), log_p_RV


def _logits_gradient(log_p_RV: Tensor, labels_R: Tensor, dtype: torch.dtype) -> Tensor:
    """Probabilities less 1 at the label, rounded once; may take the place of their logarithms.

    Rows of ignored labels are of no use. On a GPU what takes long is to read and write [R, V], so that is
    done once, and the labels' column apart.
    """
    at_R1 = labels_R[:, None].clamp(min=0)
    at_label_R1 = log_p_RV.gather(1, at_R1).exp() - 1
    target_RV = log_p_RV if dtype == log_p_RV.dtype else torch.empty_like(log_p_RV, dtype=dtype)
    return torch.exp(log_p_RV, out=target_RV).scatter_(1, at_R1, at_label_R1.to(dtype))


def _add_product_(sum_VD: Tensor, grad_RV: Tensor, hidden_RD: Tensor) -> None:
    """Add a chunk's part to the weight's gradient, which is as exact as the weight."""
    if grad_RV.dtype == sum_VD.dtype:
        sum_VD.addmm_(grad_RV.t(), hidden_RD)
    elif sum_VD.is_cuda and "dtype_out" in torch.ops.aten.addmm.overloads():
        # Not rounded in between, and on an H100 in two thirds of the time.
        torch.addmm(sum_VD, grad_RV.t(), hidden_RD, out_dtype=sum_VD.dtype, out=sum_VD)
    else:
        sum_VD += grad_RV.t() @ hidden_RD
