"""Every module of lmkern.nn that torch.nn has, beside torch's, over masks, orders, dtypes and shapes."""

import copy
import math
import warnings

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import lmkern.nn
from lmkern.testing import measure, over_budget, pooled
from lmkern.testing.error_budget import DRAWS, FACTOR, FLOOR

WIDTH, HEADS, HIDDEN = 12, 2, 20
LAYERS = {"TransformerEncoderLayer", "TransformerDecoderLayer"}
ENCODERS = {"TransformerEncoderLayer", "TransformerEncoder"}
MODULES = (
    "MultiheadAttention", "TransformerEncoderLayer", "TransformerDecoderLayer", "TransformerEncoder",
    "TransformerDecoder", "Transformer",
)  # fmt: skip

cases = st.fixed_dictionaries(
    {
        "name": st.sampled_from(MODULES),
        "norm_first": st.booleans(),
        "batch_first": st.booleans(),
        "bias": st.booleans(),
        "batched": st.sampled_from([True, True, True, False]),
        "activation": st.sampled_from(
            ["relu", "gelu", torch.nn.functional.silu, torch.tanh, torch.nn.GELU(approximate="tanh")]
        ),
        "dtype": st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]),
        "batch": st.integers(1, 3),
        "n_q": st.integers(1, 7),
        "n_k": st.integers(1, 7),
        "mask": st.sampled_from(["none", "bool", "float", "per head", "causal", "bool causal"]),
        "memory_mask": st.sampled_from(["none", "bool", "float", "per head"]),
        "padding": st.sampled_from(["none", "bool", "float"]),
        "hint": st.booleans(),
        "seed": st.integers(0, 1000),
    }
)


def _module(namespace, case, dtype):
    options = {"norm_first": case["norm_first"], "batch_first": case["batch_first"], "bias": case["bias"]}
    options |= {"dropout": 0.0, "dtype": dtype, "dim_feedforward": HIDDEN, "activation": case["activation"]}
    name = case["name"]
    if name == "MultiheadAttention":
        return namespace.MultiheadAttention(
            WIDTH, HEADS, bias=case["bias"], batch_first=case["batch_first"], dtype=dtype
        )
    if name == "Transformer":
        return namespace.Transformer(WIDTH, HEADS, 1, 1, **options)
    layer = getattr(namespace, name if name in LAYERS else f"{name}Layer")(WIDTH, HEADS, **options)
    if name in LAYERS:
        return layer
    return getattr(namespace, name)(layer, 2, namespace.LayerNorm(WIDTH, dtype=dtype))


def _hidden(kind, *shape):
    """A mask that never hides key 0, so that every query sees a key."""
    if kind == "none":
        return None
    hidden = torch.rand(shape) < 0.4
    hidden[..., 0] = False
    if kind != "float":
        return hidden
    # Rounded as the narrowest dtype is, so that every dtype adds the same.
    return torch.randn(shape).bfloat16().float().masked_fill(hidden, -math.inf)


def _attention_mask(kind, case, n_q, n_k):
    if "causal" in kind:
        hidden = torch.ones(n_q, n_k, dtype=torch.bool).triu(1)
        return hidden if kind == "bool causal" else torch.zeros(n_q, n_k).masked_fill(hidden, -math.inf)
    batch = case["batch"] if case["batched"] else 1
    return _hidden(kind, *((batch * HEADS,) if kind == "per head" else ()), n_q, n_k)


def _padding(case, n):
    return _hidden(case["padding"], *((case["batch"],) if case["batched"] else ()), n)


def _arguments(case):
    """Positional tensors and keyword masks of a call, float32 and boolean."""
    name, n_q, n_k = case["name"], case["n_q"], case["n_k"]

    def tokens(n):
        if not case["batched"]:
            return torch.randn(n, WIDTH).to(case["dtype"])
        shape = (case["batch"], n, WIDTH) if case["batch_first"] else (n, case["batch"], WIDTH)
        return torch.randn(shape).to(case["dtype"])

    causal = case["hint"] and "causal" in case["mask"]
    if name == "MultiheadAttention":
        masks = {"attn_mask": _attention_mask(case["mask"], case, n_q, n_k)}
        masks |= {"key_padding_mask": _padding(case, n_k), "need_weights": False}
        memory = tokens(n_k)
        return (tokens(n_q), memory, memory), masks | {"is_causal": causal}
    if name in ENCODERS:
        masks = {"src_mask" if name in LAYERS else "mask": _attention_mask(case["mask"], case, n_q, n_q)}
        masks |= {"src_key_padding_mask": _padding(case, n_q)}
        return (tokens(n_q),), masks | ({"is_causal": causal} if name in LAYERS or causal else {})
    masks = {"tgt_mask": _attention_mask(case["mask"], case, n_q, n_q)}
    masks |= {"memory_mask": _attention_mask(case["memory_mask"], case, n_q, n_k)}
    masks |= {"tgt_key_padding_mask": _padding(case, n_q), "memory_key_padding_mask": _padding(case, n_k)}
    masks |= {"tgt_is_causal": causal} if name in LAYERS or causal else {}
    if name == "Transformer":
        masks["src_key_padding_mask"] = masks["memory_key_padding_mask"]
        return (tokens(n_k), tokens(n_q)), masks
    return (tokens(n_q), tokens(n_k)), masks


def _run(module, tensors, masks, dtype):
    """The output and the gradients of the inputs and all parameters."""
    leaves = {id(x): x.to(dtype).requires_grad_() for x in tensors}
    masks = {k: m.to(dtype) if torch.is_tensor(m) and m.dtype != torch.bool else m for k, m in masks.items()}
    with warnings.catch_warnings():
        # torch's, of a boolean mask beside a floating one.
        warnings.simplefilter("ignore")
        out = module(*(leaves[id(x)] for x in tensors), **masks)
    out = out[0] if isinstance(out, tuple) else out
    direction = torch.linspace(-1, 1, out.numel()).to(dtype).view(out.shape)
    gradients = torch.autograd.grad((out * direction).sum(), [*leaves.values(), *module.parameters()])
    return out.detach(), gradients


def _pair(case):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = _module(torch.nn, case, case["dtype"])
    ours = _module(lmkern.nn, case, case["dtype"])
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


@settings(max_examples=320, deadline=None, derandomize=True)
@given(case=cases)
def test_outputs_and_gradients_are_torchs_within_the_budget(case):
    # Shapes this small cost a second thread more than they give it to do.
    torch.set_num_threads(1)
    compared = _errors(case)
    if compared is None:
        return
    output, errors = compared
    if over_budget("output", output, 1.0):
        # The largest error of a few elements is chance, torch's too: judged on more draws (error_budget.py).
        seeds = range(case["seed"] + 1, case["seed"] + DRAWS)
        output = pooled([output, *(_errors({**case, "seed": seed})[0] for seed in seeds)])
    assert (found := over_budget("output", output, 1.0)) is None, found
    # Which element is the worst is chance: a rectifier's kink, a softmax that hardly moves.
    assert errors.ours_typical <= FACTOR * max(errors.torchs_typical, FLOOR) + 1.0


def _errors(case):
    """Of the output, and of all gradients together; None in float64, where all is compared here."""
    torch.manual_seed(case["seed"])
    ours, theirs = _pair(case)
    tensors, masks = _arguments(case)
    results = [_run(module, tensors, masks, case["dtype"]) for module in (ours, theirs)]
    if case["dtype"] == torch.float64:
        torch.testing.assert_close(*results, rtol=1e-9, atol=1e-9)
        return None
    exact = _run(copy.deepcopy(theirs).double(), tensors, masks, torch.float64)
    output = measure(results[0][0], results[1][0], exact[0])
    # A gradient may be the difference of far larger ones, and exactly zero: all are held to the largest.
    largest = max(float(gradient.abs().max()) for gradient in exact[1])
    triples = zip(results[0][1], results[1][1], exact[1], strict=True)
    gradients = [measure(*each, at_least=largest) for each in triples]
    return output, pooled(gradients)
