import math

import pytest
import torch
import torch.nn.functional as F

from lmkern.models import T5, T5Config

SIZES = {"vocab_size": 61, "layers": 2, "heads": 4, "width": 32, "buckets": 8, "max_distance": 16}
VARIANTS = {
    "relu": {},
    "gated": {"activation": "geglu_tanh", "feed_forward": 48, "tied": False, "scaled": False},
    "wide-heads": {"head_dim": 12, "decoder_layers": 1},
}


def _model(**options):
    torch.manual_seed(0)
    return T5(T5Config(**{**SIZES, "dropout": 0.0, **options})).eval()


def _tokens(batch, length, seed=1):
    return torch.randint(2, 61, (batch, length), generator=torch.Generator().manual_seed(seed))


def _pair():
    """source (3, 11), its mask with padding on the right, on the left and nowhere, and target (3, 7)."""
    mask = torch.ones(3, 11, dtype=torch.bool)
    mask[0, 8:] = False
    mask[1, :4] = False
    return _tokens(3, 11), mask, _tokens(3, 7, seed=2)


@pytest.fixture(params=VARIANTS, name="model")
def model_of_each_variant(request):
    return _model(**VARIANTS[request.param])


def test_padding_changes_nothing(model):
    source, mask, target = _pair()
    logits = model(source, target, mask)
    assert logits.shape == (3, 7, 61)
    other = torch.where(mask, source, 5)
    torch.testing.assert_close(model(other, target, mask), logits, rtol=0, atol=0)
    alone = model(source[:1, :8], target[:1])
    torch.testing.assert_close(alone, logits[:1], rtol=1e-4, atol=1e-5)
    assert (model(source, target) - logits)[:2].abs().amax() > 1e-2


def test_the_encoder_sees_both_ways_and_the_decoder_only_back(model):
    source, mask, target = _pair()
    logits, memory = model(source, target, mask), model.encode(source)
    source[2, 10] = 2 + (source[2, 10] - 1) % 59
    assert (model.encode(source)[2, 0] - memory[2, 0]).abs().max() > 1e-4
    source[2, 10] = _pair()[0][2, 10]
    target[:, 4] = 2 + (target[:, 4] - 1) % 59
    changed = model(source, target, mask)
    torch.testing.assert_close(changed[:, :4], logits[:, :4], rtol=0, atol=0)
    assert (changed[:, 4:] - logits[:, 4:]).abs().amax(dim=-1).min() > 1e-4


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("pieces", [(1,) * 7, (3, 1, 3)])
def test_logits_through_the_cache_are_those_of_the_whole(model, beams, pieces):
    source, mask, target = _pair()
    target = torch.cat([target.roll(i, 1) for i in range(beams)], dim=1).view(-1, 7)
    expected = model(source.repeat_interleave(beams, 0), target, mask.repeat_interleave(beams, 0))
    with torch.inference_mode():
        memory = model.encode(source, mask)
        cache = model.new_cache(3 * beams, 7)
        parts = [model.decode(part, memory, mask, cache=cache) for part in target.split(pieces, dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), expected, rtol=1e-4, atol=1e-5)
    assert cache.length == 7


@pytest.mark.parametrize(
    ("rows", "sources"),
    [
        ([1, 0, 2, 2, 5, 4], [0, 1, 2]),
        ([4, 4, 1, 0], [2, 0]),
    ],
)
def test_reordered_rows_go_on_where_others_were(rows, sources):
    model = _model()
    source, mask, target = _pair()
    target = torch.stack((target, target.flip(1)), dim=1).view(6, 7)
    rows, sources = torch.tensor(rows), torch.tensor(sources)
    with torch.inference_mode():
        memory = model.encode(source, mask)
        cache = model.new_cache(6, 7)
        model.decode(target[:, :4], memory, mask, cache=cache)
        cache.reorder(rows)
        after = model.decode(target[rows, 4:], memory[sources], mask[sources], cache=cache)
        expected = model.decode(target, memory, mask)[rows, 4:]
    torch.testing.assert_close(after, expected, rtol=1e-4, atol=1e-5)


def test_rows_of_two_sources_are_not_mixed():
    model = _model()
    source, mask, target = _pair()
    with torch.inference_mode():
        cache = model.new_cache(6, 7)
        model.decode(target.repeat_interleave(2, 0), model.encode(source, mask), mask, cache=cache)
        with pytest.raises(
            ValueError, match=r"T5Cache\.reorder: each 2 rows side by side must be of one source"
        ):
            cache.reorder(torch.tensor([0, 2, 1, 3, 4, 5]))
        with pytest.raises(ValueError, match=r"of one source; got \[0, 1, 2\]"):
            cache.reorder(torch.tensor([0, 1, 2]))
        assert cache.layers[0].batch == cache.batch == 6


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_loss_is_the_cross_entropy_of_the_logits(model, label_smoothing, reduction):
    source, mask, targets = _pair()
    targets[0, 5:] = -100
    before = model.shift_right(targets)
    assert before[:, 0].tolist() == [0, 0, 0]
    assert before[0].tolist() == [0, *targets[0, :5].tolist(), 0]
    options = {"label_smoothing": label_smoothing, "reduction": reduction}
    expected = F.cross_entropy(model(source, before, mask).mT, targets, **options)
    loss = model.loss(source, targets, mask, **options)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    ours = torch.autograd.grad(loss.sum(), list(model.parameters()))
    theirs = torch.autograd.grad(expected.sum(), list(model.parameters()))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_initial_loss_is_near_that_of_a_guess(model):
    source, mask, targets = _tokens(16, 11), None, _tokens(16, 7, seed=2)
    # Logits begin with deviation 1, which costs half a nat.
    assert model.loss(source, targets, mask).item() == pytest.approx(math.log(61) + 0.5, abs=0.4)


def test_loss_falls_on_one_batch():
    model = _model(dropout=0.05, layers=1).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    source, mask, targets = _pair()
    for _ in range(15):
        loss = model.loss(source, targets, mask)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.25 * math.log(61)


def test_dropout_is_everywhere_t5_has_it_and_in_training_only():
    model = _model(dropout=0.25)
    source, mask, target = _pair()
    assert torch.equal(model(source, target, mask), model(source, target, mask))
    assert {m.p for m in model.modules() if isinstance(m, torch.nn.Dropout)} == {0.25}
    for name in ("weight_dropout", "hidden_dropout"):
        assert {getattr(m, name) for m in model.modules() if hasattr(m, name)} == {0.25}
    assert not torch.equal(model.train()(source, target, mask), model(source, target, mask))


def test_flops_count_every_product_once():
    model = _model(decoder_layers=1)
    attention, feed_forward = 4 * 32 * 32, 2 * 32 * 128
    source = 2 * (attention + feed_forward) + 2 * 32 * 32
    target = attention + 2 * 32 * 32 + feed_forward + 61 * 32
    pairs = 2 * 10 * 10 + 5 * 5 / 2 + 5 * 10
    expected = (6 * (source * 10 + target * 5) + 12 * 32 * pairs) / 5
    assert model.flops_per_token(10, 5) == pytest.approx(expected)


def test_bad_input_is_refused_in_words():
    model = _model()
    source, mask, target = _pair()
    with pytest.raises(ValueError, match=r"T5: source must be \(B, N\) int64; got \(11,\) torch.int64"):
        model.encode(source[0])
    with pytest.raises(ValueError, match=r"T5: target must be \(B, N\) int64; got \(3, 7\) torch.float32"):
        model(source, target.float(), mask)
    with pytest.raises(
        ValueError, match=r"source_mask must be boolean \(3, 11\), True: seen; got torch.int64"
    ):
        model(source, target, mask.long())
    with pytest.raises(ValueError, match=r"source_mask must be boolean \(3, 11\), True: seen; .* \(3, 7\)"):
        model(source, target, mask[:, :7])
    with pytest.raises(ValueError, match="batch of target must be a multiple of the memory's"):
        model.decode(target, model.encode(source[:2]))
    with pytest.raises(ValueError, match=r"T5\.new_cache: batch and context must be at least 1; got 0, 7"):
        model.new_cache(0, 7)
    with pytest.raises(
        ValueError, match="T5Config: width must be a multiple of heads; got width 30, heads 4"
    ):
        T5Config(**{**SIZES, "width": 30})
    with pytest.raises(ValueError, match=r"T5Config: activation must be one of gelu, .*; got 'tanh'"):
        T5Config(activation="tanh")
