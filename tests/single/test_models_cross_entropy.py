"""The loss without its logits, against torch's cross-entropy of all of them."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from hvdlm.config import ModelConfig
from hvdlm.models import cross_entropy
from hvdlm.models.cross_entropy import linear_cross_entropy
from hvdlm.models.transformer import Transformer

N, V, D = 33, 24, 4
"""Chunks of 8 rows do not divide N."""
NEEDS_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
DEVICES = ["cpu", pytest.param("cuda", marks=NEEDS_GPU)]


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cross_entropy, "CHUNK_LOGITS", 8 * V)


def inputs(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Hidden states, weight and labels, of which some are ignored, and all of one chunk."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(N, D, generator=generator, dtype=dtype, requires_grad=True)
    weight = torch.randn(V, D, generator=generator, dtype=dtype, requires_grad=True)
    labels = torch.randint(V, (N,), generator=generator)
    labels[::7] = -100
    labels[12:24] = -100
    return hidden, weight, labels


def plain(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(F.linear(hidden, weight).float(), labels, reduction="sum")


def test_loss_and_gradients_equal_those_of_all_logits(small_chunks: None) -> None:
    hidden, weight, labels = inputs()
    found, expected = linear_cross_entropy(hidden, weight, labels), plain(hidden, weight, labels)
    assert "InChunks" in found.grad_fn.name() and found.dtype == torch.float32 and found.shape == ()
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
    wanted = torch.autograd.grad(expected / 19, (hidden, weight))
    for grad, other in zip(torch.autograd.grad(found / 19, (hidden, weight)), wanted, strict=True):
        torch.testing.assert_close(grad, other, rtol=1e-5, atol=1e-7)
    assert not torch.autograd.grad(linear_cross_entropy(hidden, weight, labels), hidden)[0][::7].any()


@pytest.mark.parametrize("fixed", [None, 0, 1])
def test_gradients_are_those_of_finite_differences(small_chunks: None, fixed: int | None) -> None:
    """Of both inputs, and of one alone."""
    hidden, weight, labels = inputs(torch.float64)
    if fixed is not None:
        (hidden, weight)[fixed].requires_grad_(False)
    assert torch.autograd.gradcheck(lambda h, w: linear_cross_entropy(h, w, labels), (hidden, weight))


@pytest.mark.parametrize("device", DEVICES)
def test_bf16_sums_the_gradient_of_the_weight_in_fp32(small_chunks: None, device: str) -> None:
    hidden, weight, labels = (x.detach().to(device).requires_grad_(x.requires_grad) for x in inputs())
    exact = torch.autograd.grad(plain(hidden, weight, labels), (hidden, weight))
    with torch.autocast(device, torch.bfloat16):
        found, rough = linear_cross_entropy(hidden, weight, labels), plain(hidden, weight, labels)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, rough, rtol=1e-6, atol=0)
    errors = [
        [
            (g - e).norm() / e.norm()
            for g, e in zip(torch.autograd.grad(loss, (hidden, weight)), exact, strict=True)
        ]
        for loss in (found, rough)
    ]
    assert all(ours < 1.1 * theirs < 0.02 for ours, theirs in zip(*errors, strict=True))


def test_evaluation_computes_no_gradient(small_chunks: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(cross_entropy, "_logits_gradient")
    hidden, weight, labels = inputs()
    for mode in (torch.no_grad(), torch.inference_mode()):
        with mode:
            found, expected = linear_cross_entropy(hidden, weight, labels), plain(hidden, weight, labels)
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
    with pytest.raises(NameError):
        linear_cross_entropy(hidden, weight, labels)


def test_what_fits_into_one_chunk_keeps_its_bits() -> None:
    hidden, weight, labels = inputs()
    found, expected = linear_cross_entropy(hidden, weight, labels), plain(hidden, weight, labels)
    assert torch.equal(found, expected)
    pairs = zip(*(torch.autograd.grad(loss, (hidden, weight)) for loss in (found, expected)), strict=True)
    assert all(torch.equal(ours, theirs) for ours, theirs in pairs)


@pytest.mark.parametrize("tied", [False, True])
def test_a_model_learns_the_same_from_chunks(monkeypatch: pytest.MonkeyPatch, tied: bool) -> None:
    torch.manual_seed(0)
    model = Transformer(ModelConfig(layers=1, width=16, heads=2, tie_embeddings=tied), 64)
    tokens, labels = torch.randint(64, (2, 2, 40)).unbind()
    labels[0, :25] = -100
    gradients = []
    for budget in (2**24, 64):
        monkeypatch.setattr(cross_entropy, "CHUNK_LOGITS", budget)
        model.zero_grad()
        loss, count = model.loss(tokens, labels)
        (loss / count).backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert "InChunks" in loss.grad_fn.name()  # type: ignore[union-attr]
    for whole, chunks in zip(*gradients, strict=True):
        torch.testing.assert_close(chunks, whole, rtol=1e-5, atol=1e-7)


PEAK = """
import torch
from hvdlm.models.cross_entropy import linear_cross_entropy

def peak_mib():
    return next(int(line.split()[1]) / 1024 for line in open("/proc/self/status") if line.startswith("VmHWM"))

torch.set_num_threads(1)
hidden, weight = torch.randn(2048, 64, requires_grad=True), torch.randn(50304, 64, requires_grad=True)
linear_cross_entropy(hidden[:1], weight, torch.zeros(1, dtype=torch.int64)).backward()
before = peak_mib()
linear_cross_entropy(hidden, weight, torch.arange(2048)).backward()
print(peak_mib() - before)
"""


def test_memory_stays_below_that_of_the_logits() -> None:
    done = subprocess.run([sys.executable, "-c", PEAK], capture_output=True, text=True, check=True)
    logits_mib = 2048 * 50304 * 4 / 2**20
    assert 32 < float(done.stdout) < 0.6 * logits_mib
