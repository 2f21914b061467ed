"""Flex attention, which CUDA takes, against the dense mask of the CPU; without a compiler, which would take
a minute here. Torch has no backward pass of flex attention for the CPU."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from hvdlm.bench import mask as benchmark
from hvdlm.config import ModelConfig
from hvdlm.models import masks
from hvdlm.models.compilation import compile_blocks_
from hvdlm.models.layers import attend
from hvdlm.models.transformer import Transformer

T = 600
"""Five blocks of flex attention, the last not whole."""

IGNORE_TORCH_OF_ITSELF = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def packed_positions(batch: int, *, seed: int) -> torch.Tensor:
    """Documents of about 40 tokens."""
    torch.manual_seed(seed)
    return benchmark.packed_positions(batch, T, 40)


def document_numbers(batch: int, *, seed: int) -> torch.Tensor:
    return (packed_positions(batch, seed=seed) == 0).cumsum(1)


@pytest.fixture
def uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(masks, "compiled", lambda function: function)


def test_the_dense_mask_is_the_definition() -> None:
    positions = packed_positions(2, seed=0)
    mask = masks.document_mask(positions, head_size=16)
    assert isinstance(mask, torch.Tensor) and mask.shape == (2, 1, T, T)
    for b in range(2):
        begin = 0
        for q in range(T):
            begin = q if positions[b, q] == 0 else begin
            allowed = torch.arange(T)
            assert torch.equal(mask[b, 0, q], (allowed >= begin) & (allowed <= q))


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_flex_attention_equals_the_dense_mask(uncompiled: None, kv_heads: int) -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(3, h, T, 16, generator=generator) for h in (4, kv_heads, kv_heads))
    block = masks.block_mask(document_numbers(3, seed=1))
    dense = masks.document_mask(packed_positions(3, seed=1), head_size=16)
    assert block.sparsity() > 45  # Blocks of other documents are skipped, not only those of the future.
    torch.testing.assert_close(attend(q, k, v, mask=block), attend(q, k, v, mask=dense))


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_a_model_computes_the_same_by_flex_attention(
    uncompiled: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    model = Transformer(ModelConfig(layers=2, width=64, heads=4, kv_heads=2), 64).eval()
    tokens, positions = torch.randint(64, (2, T)), packed_positions(2, seed=2)
    with torch.inference_mode():
        dense = model.loss(tokens, tokens, positions)[0]
        block = masks.block_mask((positions == 0).cumsum(1))
        monkeypatch.setattr("hvdlm.models.transformer.document_mask", lambda *_, **__: block)
        torch.testing.assert_close(model.loss(tokens, tokens, positions)[0], dense)


@IGNORE_TORCH_OF_ITSELF
def test_every_batch_has_its_own_mask_and_one_compilation(monkeypatch: pytest.MonkeyPatch) -> None:
    """A last batch of another size costs one more, and evaluation, which has no gradients, one."""
    counters = {}

    def compile_and_count(function: Callable[..., Any]) -> Callable[..., Any]:
        counters[function.__name__] = CompileCounterWithBackend("eager")
        return torch.compile(function, backend=counters[function.__name__])

    def compilations(batch: int, seed: int) -> list[int]:
        q = torch.randn(batch, 2, T, 16)
        mask = masks.block_mask(document_numbers(batch, seed=seed))
        dense = masks.document_mask(packed_positions(batch, seed=seed), head_size=16)
        torch.testing.assert_close(masks.attend_in_blocks(q, q, q, mask), attend(q, q, q, mask=dense))
        return [counter.frame_count for counter in counters.values()]

    monkeypatch.setattr(masks, "compiled", functools.cache(compile_and_count))
    assert [compilations(4, seed) for seed in range(4)] == [[1, 1]] * 4
    assert [compilations(batch, 5) for batch in (3, 2, 4)] == [[2, 2]] * 3
    with torch.inference_mode():
        assert [compilations(batch, 5) for batch in (4, 3)] == [[3, 3]] * 2


@IGNORE_TORCH_OF_ITSELF
def test_what_is_compiled_is_kept() -> None:
    assert masks.compiled(masks.flex_attention) is masks.compiled(masks.flex_attention)


@IGNORE_TORCH_OF_ITSELF
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
@pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores:UserWarning")
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("compiled", [False, True])
def test_a_gpu_learns_from_documents_what_the_dense_mask_teaches(
    monkeypatch: pytest.MonkeyPatch, precision: torch.dtype, compiled: bool
) -> None:
    torch.manual_seed(0)
    config = ModelConfig(layers=2, width=128, heads=4, kv_heads=2)
    tokens, positions = torch.randint(64, (2, T)).cuda(), packed_positions(2, seed=2).cuda()
    model = Transformer(config, 64).cuda()
    found = []
    for is_dense in (False, True):
        if is_dense:
            mask = masks.document_mask(positions.cpu(), head_size=32)
            assert isinstance(mask, torch.Tensor)
            on_gpu = mask.cuda()
            monkeypatch.setattr(
                "hvdlm.models.transformer.document_mask", lambda *_, on_gpu=on_gpu, **__: on_gpu
            )
        elif compiled:
            compile_blocks_(model)
        with torch.autocast("cuda", precision, enabled=precision != torch.float32):
            loss = model.loss(tokens, tokens, positions)[0] / tokens.numel()
        loss.backward()
        found.append((loss.detach(), [p.grad for p in model.parameters()]))
        model.zero_grad()
    (loss, gradients), (dense_loss, dense_gradients) = found
    tolerance = 1e-4 if precision == torch.float32 else 3e-2
    torch.testing.assert_close(loss, dense_loss, rtol=tolerance, atol=0)
    for mine, theirs in zip(gradients, dense_gradients, strict=True):
        assert mine is not None and theirs is not None
        assert (mine - theirs).norm() < 5 * tolerance * theirs.norm()
