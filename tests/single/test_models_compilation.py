"""Blocks compiled for training, against the same blocks as they are."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters

from hvdlm.config import ModelConfig, UserError
from hvdlm.models import masks
from hvdlm.models.compilation import compile_blocks_
from hvdlm.models.transformer import Transformer

# Of torch's compiler, which also looks for some of its own.
pytestmark = pytest.mark.filterwarnings("ignore")

SMALL = {"layers": 3, "width": 64, "heads": 4, "kv_heads": 2}
POSITIONS = torch.cat([torch.arange(20), torch.arange(12)]).repeat(2, 1)


def build(**changes: object) -> Transformer:
    torch.manual_seed(0)
    return Transformer(ModelConfig(**SMALL | changes), 128)  # type: ignore[arg-type]


def tokens(seed: int = 1) -> torch.Tensor:
    return torch.randint(128, (2, 32), generator=torch.Generator().manual_seed(seed))


@pytest.fixture(autouse=True)
def nothing_compiled() -> None:
    torch._dynamo.reset()
    counters.clear()


@pytest.mark.parametrize(
    ("changes", "positions"),
    [({}, None), ({"dropout": 0.3}, POSITIONS), ({"dropout": 0.3, "checkpoint_activations": True}, None)],
    ids=["plain", "mask-and-dropout", "checkpointed"],
)
def test_compiled_blocks_train_the_same(changes: dict[str, object], positions: torch.Tensor | None) -> None:
    """With one compilation for all blocks and batches, dropout that draws the same, and the same names."""
    plain, compiled = build(**changes), build(**changes)
    compile_blocks_(compiled)
    assert list(compiled.state_dict()) == list(plain.state_dict())
    for seed in (1, 2):
        losses = []
        for model in (plain, compiled):
            torch.manual_seed(seed)
            losses.append(model.loss(tokens(seed), tokens(seed + 10), positions)[0])
            losses[-1].backward()
        torch.testing.assert_close(losses[1], losses[0], rtol=1e-6, atol=0)
    for ours, p in zip(compiled.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, p.grad, rtol=1e-4, atol=1e-5)
    assert counters["stats"]["unique_graphs"] == 1


def test_compiled_blocks_train_the_same_in_bf16() -> None:
    """Up to roundings that fusing saves."""
    plain, compiled = build(), build()
    compile_blocks_(compiled)
    for model in (plain, compiled):
        with torch.autocast("cpu", torch.bfloat16):
            loss_sum, count = model.loss(tokens(), tokens(2))
        (loss_sum / count).backward()
    for ours, p in zip(compiled.parameters(), plain.parameters(), strict=True):
        assert ours.grad.dtype == torch.float32
        assert (ours.grad - p.grad).norm() < 0.02 * p.grad.norm()
    assert counters["stats"]["unique_graphs"] == 1


def test_evaluation_and_generation_are_not_compiled() -> None:
    plain, compiled = build().eval(), build().eval()
    compile_blocks_(compiled)
    with torch.inference_mode():
        assert torch.equal(compiled.loss(tokens(), tokens())[0], plain.loss(tokens(), tokens())[0])
        cached = (m(tokens(), m.new_cache(2, 32), last_only=True) for m in (plain, compiled))
        assert torch.equal(*cached)
    assert not counters["stats"]


def test_flex_attention_is_compiled_as_part_of_a_block(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on CUDA, by Dynamo alone: torch has no backward pass of flex attention for the CPU."""
    model, counter = build(), CompileCounterWithBackend("eager")
    for block in model.blocks:
        block.compile(backend=counter)
    with torch.no_grad():
        for seed in range(3):
            begins = torch.rand(2, 300, generator=torch.Generator().manual_seed(seed)) < 1 / 40
            begins[:, 0] = True
            numbers = torch.arange(300).expand(2, 300)
            positions = numbers - torch.where(begins, numbers, 0).cummax(1).values
            text = torch.randint(128, (2, 300))
            model.eval()
            expected = model.loss(text, text, positions)[0]
            model.train()
            with monkeypatch.context() as patch:
                patch.setattr(masks, "compiled", lambda function: function)
                block_mask = masks.block_mask((positions == 0).cumsum(1))
                patch.setattr(masks, "compiled", None)  # Not to be called again.
                patch.setattr("hvdlm.models.transformer.document_mask", lambda *_, m=block_mask, **__: m)
                torch.testing.assert_close(model.loss(text, text, positions)[0], expected)
    assert counter.frame_count == 1


def test_without_a_compiler_it_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match=r"^model\.compile true: .* no g\+\+ in PATH; load one") as caught:
        compile_blocks_(build())
    assert "\n" not in str(caught.value)
    monkeypatch.setenv("CXX", "mine")
    with pytest.raises(UserError, match="no mine in PATH"):
        compile_blocks_(build())
    (tmp_path / "mine").touch(0o755)
    compile_blocks_(build())
