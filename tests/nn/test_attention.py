import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lmkern.nn import KeyValueCache, MultiheadAttention, Rotary, SelfAttention

N_Q, N_K, BATCH, HEADS, WIDTH = 5, 7, 3, 2, 8


def _pair(**options):
    """torch's module with random parameters, and ours with the same."""
    theirs = torch.nn.MultiheadAttention(WIDTH, HEADS, dtype=torch.float64, **options)
    ours = MultiheadAttention(WIDTH, HEADS, dtype=torch.float64, **options)
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def _mask(kind, *shape):
    """A mask that hides some keys, never all: key 0 is always seen."""
    if kind == "none":
        return None
    hidden = torch.rand(shape) < 0.4
    hidden[..., 0] = False
    if kind == "bool":
        return hidden
    return torch.randn(shape, dtype=torch.float64).masked_fill(hidden, -math.inf)


def _assert_same(ours, theirs, inputs, **options):
    """Outputs, weights and the gradients of inputs, parameters and both together."""
    results = []
    for module in (ours, theirs):
        leaves = {id(x): x.clone().requires_grad_() for x in inputs}
        out, weights = module(*(leaves[id(x)] for x in inputs), **options)
        loss = (out * torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)).sum()
        if weights is not None:
            loss = (
                loss
                + (weights * torch.linspace(0, 2, weights.numel(), dtype=out.dtype).view_as(weights)).sum()
            )
        gradients = torch.autograd.grad(loss, [*leaves.values(), *module.parameters()])
        results.append((out, weights, gradients))
    torch.testing.assert_close(results[0], results[1], rtol=1e-10, atol=1e-10)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    options=st.fixed_dictionaries(
        {
            "bias": st.booleans(),
            "add_bias_kv": st.booleans(),
            "add_zero_attn": st.booleans(),
            "batch_first": st.booleans(),
            "kdim": st.sampled_from([None, 6]),
            "vdim": st.sampled_from([None, 10]),
        }
    ),
    attn_mask=st.sampled_from(["none", "bool", "float"]),
    per_head=st.booleans(),
    key_padding_mask=st.sampled_from(["none", "bool"]),
    batched=st.booleans(),
    need_weights=st.booleans(),
    average=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_matches_torch(options, attn_mask, per_head, key_padding_mask, batched, need_weights, average, seed):
    torch.manual_seed(seed)
    # torch warns when one mask is boolean and the other floating.
    if attn_mask == "float" and key_padding_mask == "bool":
        key_padding_mask = "float"
    ours, theirs = _pair(**options)
    batch = BATCH if batched else 1
    inputs = []
    for length, width in ((N_Q, WIDTH), (N_K, ours.kdim), (N_K, ours.vdim)):
        shape = (batch, length, width) if options["batch_first"] else (length, batch, width)
        inputs.append(torch.randn(shape if batched else (length, width), dtype=torch.float64))
    _assert_same(
        ours,
        theirs,
        inputs,
        attn_mask=_mask(attn_mask, *((batch * HEADS,) if per_head else ()), N_Q, N_K),
        key_padding_mask=_mask(key_padding_mask, *((batch,) if batched else ()), N_K),
        need_weights=need_weights,
        average_attn_weights=average,
    )


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("causal", [True, False])
def test_self_attention_matches_torch(batch_first, need_weights, causal):
    torch.manual_seed(0)
    ours, theirs = _pair(batch_first=batch_first)
    x = torch.randn((BATCH, 6, WIDTH) if batch_first else (6, BATCH, WIDTH), dtype=torch.float64)
    mask = torch.ones(6, 6, dtype=torch.bool).triu(1) if causal else None
    _assert_same(ours, theirs, (x, x, x), attn_mask=mask, is_causal=causal, need_weights=need_weights)


@pytest.mark.parametrize("extra", [{}, {"add_bias_kv": True}, {"add_zero_attn": True}])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("need_weights", [True, False])
def test_is_causal_without_a_mask_is_the_causal_mask(extra, padded, need_weights):
    torch.manual_seed(0)
    ours, _ = _pair(batch_first=True, **extra)
    query, key = torch.randn(BATCH, N_Q, WIDTH).double(), torch.randn(BATCH, N_K, WIDTH).double()
    options = {
        "key_padding_mask": _mask("bool", BATCH, N_K) if padded else None,
        "need_weights": need_weights,
    }
    mask = torch.ones(N_Q, N_K, dtype=torch.bool).triu(1)
    hinted = ours(query, key, key, is_causal=True, **options)
    torch.testing.assert_close(hinted, ours(query, key, key, attn_mask=mask, **options))


def test_starts_as_torchs_does_and_loads_both_ways():
    for options in ({}, {"kdim": 4, "vdim": 6}, {"add_bias_kv": True, "bias": False}):
        torch.manual_seed(3)
        theirs = torch.nn.MultiheadAttention(8, 2, **options)
        torch.manual_seed(3)
        ours = MultiheadAttention(8, 2, **options)
        assert list(ours.state_dict()) == list(theirs.state_dict())
        torch.testing.assert_close(dict(ours.state_dict()), dict(theirs.state_dict()), rtol=0, atol=0)
        theirs.load_state_dict(ours.state_dict())


@pytest.mark.parametrize("kind", ["bool", "float"])
@pytest.mark.parametrize("need_weights", [True, False])
def test_query_that_sees_no_key_gets_zeros_and_finite_gradients(kind, need_weights):
    torch.manual_seed(0)
    ours, _ = _pair(batch_first=True, bias=False)
    x = torch.randn(1, 4, WIDTH, dtype=torch.float64, requires_grad=True)
    mask = torch.zeros(4, 4, dtype=torch.bool)
    mask[2] = True
    if kind == "float":
        mask = torch.zeros(4, 4, dtype=torch.float64).masked_fill(mask, -math.inf)
    out, weights = ours(x, x, x, attn_mask=mask, need_weights=need_weights)
    assert (out[0, 2] == 0).all()
    assert (out[0, 1] != 0).all()
    assert weights is None or (weights[0, 2] == 0).all()
    (dx,) = torch.autograd.grad(out.sum(), x)
    assert dx.isfinite().all()


def test_weights_are_dropped_in_training_only():
    torch.manual_seed(0)
    module = MultiheadAttention(8, 2, dropout=0.5, batch_first=True)
    x = torch.randn(4, 16, 8)
    _, weights = module(x, x, x, average_attn_weights=False)
    assert 0.4 < (weights == 0).float().mean() < 0.6
    assert not torch.equal(module(x, x, x, need_weights=False)[0], module(x, x, x, need_weights=False)[0])
    module.eval()
    assert (module(x, x, x)[1] > 0).all()
    torch.testing.assert_close(module(x, x, x, need_weights=False)[0], module(x, x, x)[0])


@pytest.mark.parametrize(
    ("shapes", "options", "message"),
    [
        (((2, 3, 8), (3, 8), (3, 8)), {}, "all be batched"),
        (((2, 3, 8), (2, 3, 6), (2, 3, 8)), {}, r"widths \(8, 8, 8\); got query"),
        (((2, 3, 8), (4, 3, 8), (4, 3, 8)), {}, "share the batch size"),
        (((2, 3, 8), (2, 3, 8), (2, 4, 8)), {}, "share the batch size"),
        (
            ((2, 3, 8),) * 3,
            {"attn_mask": torch.zeros(3, 4)},
            r"attn_mask must be \(3, 3\) or \(4, 3, 3\); got \(3, 4\)",
        ),
        (((2, 3, 8),) * 3, {"key_padding_mask": torch.zeros(3, 2)}, r"key_padding_mask must be \(2, 3\)"),
        (((2, 3, 8),) * 3, {"attn_mask": torch.zeros(3, 3, dtype=torch.int64)}, "boolean .* got torch.int64"),
    ],
)
def test_bad_input_is_named(shapes, options, message):
    with pytest.raises(ValueError, match=f"MultiheadAttention: .*{message}"):
        MultiheadAttention(8, 2, batch_first=True)(*(torch.zeros(shape) for shape in shapes), **options)


def _reference(module, x):
    """The formula, head by head, in float64."""
    heads, kv_heads, head_dim = module.heads, module.kv_heads, module.head_dim
    qkv = (x @ module.qkv.weight.mT + module.qkv.bias).view(*x.shape[:2], -1, head_dim)
    outs = []
    for h in range(heads):
        group = h // (heads // kv_heads)
        q, k, v = qkv[:, :, h], qkv[:, :, heads + group], qkv[:, :, heads + kv_heads + group]
        if module.rotary is not None:
            q, k = (module.rotary(part[:, :, None])[:, :, 0] for part in (q, k))
        scores = q @ k.mT / math.sqrt(head_dim)
        scores = scores + torch.full_like(scores, -math.inf).triu(1)
        outs.append(scores.softmax(-1) @ v)
    return torch.cat(outs, dim=-1) @ module.out.weight.mT + module.out.bias


@pytest.mark.parametrize("kv_heads", [None, 2, 1])
@pytest.mark.parametrize("rotary", [True, False])
def test_self_attention_is_the_formula(kv_heads, rotary):
    torch.manual_seed(0)
    module = SelfAttention(24, 4, kv_heads=kv_heads, rotary=Rotary(6, 11) if rotary else None).double()
    x = torch.randn(2, 11, 24, dtype=torch.float64, requires_grad=True)
    y, expected = module(x), _reference(module, x)
    torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-10)
    weights = torch.randn_like(y)
    leaves = [x, *module.parameters()]
    gradients = torch.autograd.grad((y * weights).sum(), leaves)
    torch.testing.assert_close(gradients, torch.autograd.grad((expected * weights).sum(), leaves))


def test_self_attention_hands_the_op_views_of_one_product(monkeypatch):
    seen = []

    def attention(q, k, v, **_options):
        seen.extend((q, k, v))
        return torch.empty_like(q)

    monkeypatch.setattr("lmkern.nn.attention.attention", attention)
    SelfAttention(16, 4, kv_heads=2)(torch.randn(2, 5, 16))
    storages = {x.untyped_storage().data_ptr() for x in seen}
    assert len(storages) == 1
    assert [tuple(x.shape) for x in seen] == [(2, 4, 5, 4), (2, 2, 5, 4), (2, 2, 5, 4)]


def test_self_attention_checks_heads():
    with pytest.raises(ValueError, match="SelfAttention: width must be a multiple of heads; got 10, 4"):
        SelfAttention(10, 4)
    with pytest.raises(ValueError, match="SelfAttention: heads must be a multiple of kv_heads; got 4, 3"):
        SelfAttention(8, 4, kv_heads=3)


def test_cache_returns_views_of_all_so_far():
    cache = KeyValueCache(2, 6)
    k, v = torch.randn(2, 3, 6, 4), torch.randn(2, 3, 6, 4)
    cache.append(k[:, :, :4], v[:, :, :4])
    keys, values = cache.append(k[:, :, 4:], v[:, :, 4:])
    assert cache.length == 6
    torch.testing.assert_close((keys, values), (k, v), rtol=0, atol=0)
    assert keys.data_ptr() == cache.append(k[:, :, :0], v[:, :, :0])[0].data_ptr()


def test_cache_refuses_more_than_it_holds_and_keeps_what_it_has():
    cache = KeyValueCache(2, 6)
    cache.append(torch.ones(2, 1, 5, 4), torch.ones(2, 1, 5, 4))
    for shape in ((2, 1, 2, 4), (1, 1, 1, 4)):
        with pytest.raises(
            ValueError, match="KeyValueCache: expected a batch of 2 and at most 1 more tokens"
        ):
            cache.append(torch.zeros(shape), torch.zeros(shape))
    keys, _ = cache.append(torch.ones(2, 1, 1, 4), torch.ones(2, 1, 1, 4))
    assert cache.length == 6
    assert (keys == 1).all()


def test_cache_takes_the_dtype_of_the_keys_so_autocast_needs_no_casts():
    module = SelfAttention(16, 2)
    cache = KeyValueCache(1, 4)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        module(torch.randn(1, 3, 16), cache=cache)
        keys, _ = cache.append(*(torch.zeros(1, 2, 1, 8, dtype=torch.bfloat16),) * 2)
    assert keys.dtype == torch.bfloat16
