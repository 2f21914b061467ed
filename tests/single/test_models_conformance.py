"""What every model in MODELS must do; a new model is tested by its line there."""

import math

import pytest
import torch

from hvdlm.config import ModelConfig
from hvdlm.models import MODELS, pad_vocab

VOCAB = 128
SMALL = {"layers": 2, "width": 32, "heads": 4, "kv_heads": 2}


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(params=sorted(MODELS))
def kind(request):
    return request.param


def build(kind, seed=0, **changes):
    torch.manual_seed(seed)
    return MODELS[kind](ModelConfig(kind=kind, **SMALL | changes), VOCAB)


def tokens(batch=2, positions=16, seed=1):
    return torch.randint(VOCAB, (batch, positions), generator=torch.Generator().manual_seed(seed))


def test_initial_loss_is_near_that_of_a_uniform_guess(kind):
    loss_sum, count = build(kind).loss(tokens(8), tokens(8, seed=2))
    assert count == 8 * 16
    assert loss_sum.dtype == torch.float32 and loss_sum.shape == ()
    assert abs(loss_sum.item() / count - math.log(VOCAB)) < 0.1


def test_ignored_labels_do_not_count(kind):
    model, labels = build(kind), tokens(seed=2)
    first_half = torch.cat((labels[:, :8], torch.full_like(labels[:, 8:], -100)), 1)
    loss_sum, count = model.loss(tokens(), first_half)
    short_sum, short_count = model.loss(tokens()[:, :8], labels[:, :8])
    assert count == short_count == 16
    torch.testing.assert_close(loss_sum, short_sum)


def test_loss_of_no_labels_is_zero(kind):
    loss_sum, count = build(kind).loss(tokens(), torch.full((2, 16), -100))
    loss_sum.backward()
    assert loss_sum.item() == 0 and count == 0


def test_no_future_token_reaches_a_past_logit(kind):
    model = build(kind).eval()
    before = tokens()
    after = before.clone()
    after[:, 9:] = (after[:, 9:] + 1) % VOCAB
    torch.testing.assert_close(model(before)[:, :9], model(after)[:, :9])
    assert not torch.allclose(model(before)[:, 9:], model(after)[:, 9:])


def test_every_past_token_reaches_the_last_logit(kind):
    model = build(kind).eval()
    before = tokens(batch=1)
    for position in range(before.shape[1]):
        after = before.clone()
        after[:, position] = (after[:, position] + 1) % VOCAB
        assert not torch.equal(model(before)[:, -1], model(after)[:, -1]), position


@pytest.mark.parametrize("tied", [False, True])
def test_every_parameter_gets_a_gradient(kind, tied):
    model = build(kind, tie_embeddings=tied)
    model.loss(tokens(), tokens(seed=2))[0].backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_over_fits_one_batch(kind):
    model = build(kind)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(60):
        loss_sum, count = model.loss(tokens(), tokens(seed=2))
        optimizer.zero_grad()
        (loss_sum / count).backward()
        optimizer.step()
    assert loss_sum.item() / count < 0.1


def test_cached_decoding_equals_the_full_forward(kind):
    model, text = build(kind).eval(), tokens()
    cache = model.new_cache(2, 16)
    parts = [model(text[:, a:b], cache) for a, b in ((0, 5), (5, 6), (6, 7), (7, 12), (12, 16))]
    torch.testing.assert_close(torch.cat(parts, 1), model(text), atol=1e-5, rtol=1e-4)


def test_last_only_is_the_last_logit_and_a_cleared_cache_is_new(kind):
    model, text = build(kind).eval(), tokens()
    cache = model.new_cache(2, 16)
    model(text.flip(1), cache)
    cache.clear()
    torch.testing.assert_close(model(text, cache, last_only=True), model(text)[:, -1:])


def test_full_cache_is_refused(kind):
    model = build(kind)
    with pytest.raises(ValueError, match="17 positions do not fit into 16"):
        model(tokens(positions=17), model.new_cache(2, 16))


DOCUMENTS = (5, 1, 1, 9)
"""Lengths of the documents in a window of 16 tokens."""


def packed_positions(batch=2):
    return torch.cat([torch.arange(length) for length in DOCUMENTS]).repeat(batch, 1)


def test_with_positions_no_token_reaches_another_document(kind):
    model = build(kind).eval()
    before, positions = tokens(), packed_positions()
    document = (positions[0] == 0).cumsum(0)
    for position in range(16):
        after = before.clone()
        after[:, position] = (after[:, position] + 1) % VOCAB
        changed = (model(before, positions=positions) != model(after, positions=positions)).any(-1)
        reached = (document == document[position]) & (torch.arange(16) >= position)
        assert torch.equal(changed, reached.expand(2, 16)), position


def test_a_packed_window_is_its_documents_alone(kind):
    """Losses and gradients, also of the end of one document that predicts the start of the next."""
    model, text, labels = build(kind), tokens(), tokens(seed=2)
    labels[0, 3] = -100
    packed, count = model.loss(text, labels, packed_positions())
    packed.backward()
    gradients = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    pieces = zip(text.split(DOCUMENTS, 1), labels.split(DOCUMENTS, 1), strict=True)
    alone = [model.loss(*piece) for piece in pieces]
    loss_sum = sum(loss for loss, _ in alone)
    loss_sum.backward()
    assert count == sum(count for _, count in alone) == 31
    torch.testing.assert_close(packed, loss_sum, rtol=1e-6, atol=0)
    for found, p in zip(gradients, model.parameters(), strict=True):
        torch.testing.assert_close(found, p.grad, rtol=1e-4, atol=1e-6)


def test_positions_of_one_document_change_nothing(kind):
    model, text = build(kind), tokens()
    one = torch.arange(16).expand(2, 16)
    torch.testing.assert_close(model(text, positions=one), model(text))


def test_documents_of_one_batch_may_differ(kind):
    model, text = build(kind), tokens()
    positions = torch.stack([packed_positions()[0], torch.arange(16)])
    both = model(text, positions=positions)
    torch.testing.assert_close(both[:1], model(text[:1], positions=positions[:1]))
    torch.testing.assert_close(both[1:], model(text[1:]))


def test_positions_with_a_cache_are_refused(kind):
    model = build(kind)
    with pytest.raises(ValueError, match="positions came with a KV cache"):
        model(tokens(), model.new_cache(2, 16), positions=packed_positions())


def test_dropout_acts_in_training_only_and_follows_the_seed(kind):
    model = build(kind, dropout=0.5)
    first, second, third = (seeded(model, seed) for seed in (1, 1, 2))
    assert torch.equal(first, second) and not torch.equal(first, third)
    model.eval()
    assert torch.equal(seeded(model, 1), seeded(model, 2))


def seeded(model, seed):
    torch.manual_seed(seed)
    return model(tokens())


@pytest.mark.parametrize("masked", [False, True])
def test_checkpointed_activations_give_the_same_bits_from_less_memory(kind, masked):
    results, saved_bytes = [], []
    for checkpointed in (False, True):
        kept = []
        model = build(kind, dropout=0.3, checkpoint_activations=checkpointed)
        torch.manual_seed(5)
        with torch.autograd.graph.saved_tensors_hooks(lambda t, kept=kept: kept.append(t) or t, lambda t: t):
            loss_sum, _ = model.loss(tokens(), tokens(seed=2), packed_positions() if masked else None)
        loss_sum.backward()
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in kept}
        own = {p.untyped_storage().data_ptr() for p in model.parameters()}
        saved_bytes.append(sum(size for where, size in storages.items() if where not in own))
        results.append([loss_sum, *(p.grad for p in model.parameters())])
    assert all(torch.equal(plain, again) for plain, again in zip(*results, strict=True))
    assert saved_bytes[1] < 0.6 * saved_bytes[0]


@pytest.mark.parametrize("threads", [1, 2])
def test_initial_weights_depend_only_on_the_seed(kind, threads):
    torch.set_num_threads(1)
    expected = build(kind, 3).state_dict()
    torch.set_num_threads(threads)
    same, other = build(kind, 3).state_dict(), build(kind, 4).state_dict()
    assert all(torch.equal(expected[name], same[name]) for name in expected)
    assert any(not torch.equal(expected[name], other[name]) for name in expected)


def test_state_dict_holds_parameters_only_and_each_once(kind):
    model = build(kind, tie_embeddings=True)
    state = model.state_dict()
    assert list(state) == [name for name, _ in model.named_parameters()]
    assert len({tensor.data_ptr() for tensor in state.values()}) == len(state)


def test_autocast_to_bf16_keeps_the_loss_in_fp32(kind):
    model = build(kind)
    exact, _ = model.loss(tokens(), tokens(seed=2))
    with torch.autocast("cpu", torch.bfloat16):
        rough, _ = model.loss(tokens(), tokens(seed=2))
    rough.backward()
    assert rough.dtype == torch.float32 and rough != exact
    torch.testing.assert_close(rough, exact, rtol=5e-3, atol=0)
    assert all(p.grad.dtype == torch.float32 for p in model.parameters())


@pytest.mark.parametrize(("size", "padded"), [(1, 64), (64, 64), (65, 128), (1000, 1024), (50257, 50304)])
def test_pad_vocab(size, padded):
    assert pad_vocab(size) == padded
