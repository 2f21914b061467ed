"""The transformer's own properties; what every model must do is in test_models_conformance.py."""

from dataclasses import replace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from hvdlm.config import ModelConfig
from hvdlm.models.layers import rotary_table, rotate
from hvdlm.models.transformer import Transformer, mlp_width

SMALL = ModelConfig(layers=2, width=64, heads=4, kv_heads=2, mlp_width=96, tie_embeddings=False)


def test_names_are_stable():
    # Checkpoints on disk hold these names.
    layer = ["attention_norm", "attention.query", "attention.key", "attention.value", "attention.out"]
    layer += ["mlp_norm", "mlp.gate", "mlp.up", "mlp.down"]
    expected = ["embedding"] + [f"blocks.{i}.{name}" for i in range(2) for name in layer] + ["norm", "head"]
    assert list(Transformer(SMALL, 64).state_dict()) == [f"{name}.weight" for name in expected]


def test_initial_weights():
    torch.manual_seed(0)
    for name, weight in Transformer(ModelConfig(layers=8, width=256, heads=4), 512).named_parameters():
        if name.endswith("norm.weight"):
            assert torch.equal(weight, torch.ones(256))
        else:
            residual = name.endswith(("attention.out.weight", "mlp.down.weight"))
            assert weight.std().item() == pytest.approx(0.005 if residual else 0.02, rel=0.05), name
            assert abs(weight.mean().item()) < 1e-3


@pytest.mark.parametrize(("width", "expected"), [(128, 384), (192, 512), (768, 2048), (4096, 10944)])
def test_automatic_mlp_width(width, expected):
    assert mlp_width(ModelConfig(width=width)) == expected


def counted_flops(model, tokens, positions=None):
    """Of forward and backward pass, as torch counts them."""
    # The other backends' backward passes compute the scores again, which MFU must not count.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model.loss(tokens, tokens, positions)[0].backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("seq_len", [16, 80])
@pytest.mark.parametrize(
    "shape",
    [
        {"layers": 3, "width": 64, "heads": 4, "kv_heads": 1},
        {"layers": 2, "width": 96, "heads": 6, "kv_heads": 2, "mlp_width": 40},
        {"layers": 1, "width": 128, "heads": 2},
    ],
    ids=["one-kv-head", "groups", "all-heads"],
)
def test_flops_per_token_equal_what_torch_counts(shape, tied, seq_len):
    model = Transformer(ModelConfig(**shape, tie_embeddings=tied), 128)
    tokens = torch.randint(128, (2, seq_len))
    assert counted_flops(model, tokens) == model.flops_per_token(seq_len) * tokens.numel()


def test_flops_per_token_count_what_is_needed_and_not_what_is_done():
    """Checkpointing does the blocks' forward pass again, all but its last projection; a mask adds nothing."""
    model, tokens = Transformer(SMALL, 64), torch.randint(64, (2, 32))
    again = Transformer(replace(SMALL, checkpoint_activations=True), 64)
    useful = model.flops_per_token(32)
    assert again.flops_per_token(32) == useful
    blocks_forward, last_projections = (useful - 6 * 64 * 64) / 3, 2 * SMALL.layers * 64 * 96
    assert counted_flops(again, tokens) == (useful + blocks_forward - last_projections) * tokens.numel()
    assert counted_flops(model, tokens, torch.arange(16).repeat(2, 2)) == useful * tokens.numel()


def test_rotary_scores_depend_on_distance_only():
    query, key = torch.randn(2, 1, 8, 1, 16).unbind()
    near, far = (rotary_table(first, 8, head_size=16, theta=1e4, like=query) for first in (0, 100))
    scores = [torch.einsum("bthk,bshk->bts", rotate(query, *t), rotate(key, *t)) for t in (near, far)]
    torch.testing.assert_close(scores[0], scores[1], atol=1e-4, rtol=1e-4)
    assert not torch.allclose(rotate(query, *near), rotate(query, *far))


def test_rotary_positions_restart_with_each_document(monkeypatch):
    """With a table that tells positions apart, and not only distances as the real one does."""
    tables = torch.randn(2, 16, 1, 16)
    monkeypatch.setattr("hvdlm.models.transformer.rotary_table", lambda first, n, **_: tables[:, :n].unbind())
    model, tokens = Transformer(SMALL, 64), torch.randint(64, (1, 16))
    positions = torch.cat([torch.arange(5), torch.arange(11)])[None]
    alone = torch.cat([model(tokens[:, :5]), model(tokens[:, 5:])], 1)
    torch.testing.assert_close(model(tokens, positions=positions), alone)
