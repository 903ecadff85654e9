"""What holds of every architecture: GPT, Llama, Bert and T5."""

import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

from lmkern.models import (
    GPT,
    T5,
    Bert,
    BertConfig,
    DecoderCache,
    GPTConfig,
    Llama,
    LlamaConfig,
    T5Config,
    load,
    save,
)
from lmkern.nn import Block

SIZES = {"vocab_size": 61, "layers": 2, "heads": 4, "width": 32}
DECODER = {"context": 24}
GATED = {"activation": "geglu_tanh", "tied": False, "scaled": False}
MODELS = {
    "gpt": (GPT, GPTConfig, {**DECODER, "positions": "learned"}),
    "llama": (Llama, LlamaConfig, {**DECODER, "kv_heads": 2, "head_width": 12}),
    "llama-tied": (Llama, LlamaConfig, {**DECODER, "tied": True}),
    "bert": (Bert, BertConfig, DECODER),
    "bert-sequence": (Bert, BertConfig, {**DECODER, "head": "sequence", "labels": 5}),
    "bert-token": (Bert, BertConfig, {**DECODER, "head": "token", "labels": 5}),
    "t5": (T5, T5Config, {}),
    "t5-gated": (T5, T5Config, GATED),
}


def _model(name, dropout=0.0, **sizes):
    torch.manual_seed(0)
    model, config, options = MODELS[name]
    dropouts = {option: dropout for option in ("dropout", "attention_dropout") if hasattr(config, option)}
    return model(config(**{**SIZES, **options, **dropouts, **sizes}))


def _tokens(batch, length, seed=1):
    return torch.randint(1, 61, (batch, length), generator=torch.Generator().manual_seed(seed))


def _mask(batch):
    """Padding on the right of the first sequence and on the left of the second."""
    mask = torch.ones(batch, 11, dtype=torch.bool)
    mask[0, 8:] = False
    mask[1, :3] = False
    return mask


def _forward_arguments(model, batch=3):
    if isinstance(model, T5):
        return _tokens(batch, 11), _tokens(batch, 7, seed=2), _mask(batch)
    return (_tokens(batch, 11), _mask(batch)) if isinstance(model, Bert) else (_tokens(batch, 11),)


def _loss_arguments(model, batch=3):
    if isinstance(model, T5):
        return _forward_arguments(model, batch)
    targets = _tokens(batch, 11, seed=2)
    if isinstance(model, Bert) and model.config.head != "masked":
        targets = targets % 5
        targets = targets[:, 0] if model.config.head == "sequence" else targets
    return (_tokens(batch, 11), targets, *_forward_arguments(model, batch)[1:])


every_model = pytest.mark.parametrize("name", MODELS)


@every_model
def test_loads_what_was_saved(name, tmp_path):
    model = _model(name).eval()
    save(model, tmp_path)
    arguments = _forward_arguments(model)
    assert torch.equal(load(tmp_path)(*arguments), model(*arguments))


@every_model
def test_state_dict_that_does_not_fit_is_listed_and_nothing_is_loaded(name):
    model = _model(name)
    before = {key: x.clone() for key, x in model.state_dict().items()}
    given = {key: x + 1 for key, x in before.items()}
    given["extra"] = torch.zeros(2)
    given["embedding.weight"] = torch.zeros(60, 32)
    norm = next(key for key in given if "norm.weight" in key)
    del given[norm]
    with pytest.raises(RuntimeError, match="load_state_dict: nothing was loaded") as caught:
        model.load_state_dict(given)
    for line in ("extra: - | (2,)", "embedding.weight: (61, 32) | (60, 32)", f"{norm}: (32,) | -"):
        assert f"  {line}" in str(caught.value)
    torch.testing.assert_close(dict(model.state_dict()), before, rtol=0, atol=0)
    model.load_state_dict({key: x + 1 for key, x in before.items()})
    assert all(torch.equal(x, before[key] + 1) for key, x in model.state_dict().items())


@every_model
def test_loss_is_the_cross_entropy_of_the_logits(name):
    model = _model(name).eval()
    arguments = _loss_arguments(model)
    targets = arguments[1]
    targets[0] = -100
    before = _forward_arguments(model)
    if isinstance(model, T5):
        before = (before[0], model.shift_right(targets), before[2])
    for reduction in ("mean", "sum"):
        logits = model(*before)
        expected = F.cross_entropy(logits.flatten(0, -2), targets.flatten(), reduction=reduction)
        loss = model.loss(*arguments, reduction=reduction)
        assert loss.dtype == torch.float32
        torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["gpt", "llama", "bert", "t5"])
def test_inductor_compiles_a_training_step_whole_and_once_for_all_batches(name):
    torch.compiler.reset()
    model = _model(name, layers=1)
    parameters = list(model.parameters())
    counter = CompileCounterWithBackend("inductor")
    compiled = torch.compile(model.loss, fullgraph=True, backend=counter)
    for batch in (3, 2, 5):
        arguments = _loss_arguments(model, batch)
        for tensor in arguments:
            torch._dynamo.mark_dynamic(tensor, 0)
        losses = compiled(*arguments), model.loss(*arguments)
        torch.testing.assert_close(*losses)
        gradients = [torch.autograd.grad(loss, parameters) for loss in losses]
        torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)
    assert counter.frame_count == 1


@pytest.mark.parametrize("name", ["gpt", "llama", "bert-sequence", "t5-gated"])
def test_inference_exports(name):
    model = _model(name, layers=1).eval()
    arguments = _forward_arguments(model)
    batch = torch.export.Dim("batch", min=2, max=64)
    with torch.no_grad():
        shapes = tuple({0: batch} for _ in arguments)
        program = torch.export.export(model, arguments, dynamic_shapes=shapes)
        other = _forward_arguments(model, 4)
        torch.testing.assert_close(program.module()(*other), model(*other))


@pytest.mark.parametrize("name", ["gpt", "llama", "bert", "t5-gated"])
def test_checkpointed_blocks_give_the_same_gradients_with_dropout(name):
    model = _model(name, dropout=0.3)
    parameters, arguments = list(model.parameters()), _loss_arguments(model)

    def gradients():
        torch.manual_seed(7)
        return torch.autograd.grad(model.loss(*arguments), parameters)

    calls = []
    blocks = [module for module in model.modules() if isinstance(module, Block)]
    for block in blocks:
        # With a forward of its own a block is given the sum, and draws its dropout by itself.
        block.forward = partial(block.forward)
    expected = gradients()
    for block in blocks:

        def forward(x, plain=block.forward, **options):
            assert isinstance(x, torch.Tensor)
            calls.append(1)
            return checkpoint(plain, x, use_reentrant=False, **options)

        block.forward = forward
    for gradient, plain in zip(gradients(), expected, strict=True):
        assert torch.equal(gradient, plain)
    assert len(calls) == 2 + 2 * isinstance(model, T5)


@every_model
@pytest.mark.parametrize(("dtype", "error"), [(torch.bfloat16, 2e-2), (torch.float16, 1e-4)])
def test_autocast_is_near_float32_with_float32_gradients(name, dtype, error):
    model = _model(name).eval()
    arguments = _loss_arguments(model)
    expected = model.loss(*arguments)
    with torch.autocast("cpu", dtype):
        loss = model.loss(*arguments)
    assert loss.item() == pytest.approx(expected.item(), rel=error)
    loss.backward()
    assert {p.grad.dtype for p in model.parameters()} == {torch.float32}


@pytest.mark.parametrize("name", ["gpt", "llama", "llama-tied"])
@pytest.mark.parametrize("pieces", [(1,) * 11, (6, 1, 4)])
def test_logits_through_the_cache_are_those_of_the_whole(name, pieces):
    model = _model(name).eval()
    tokens = _tokens(3, 11)
    cache = model.new_cache(3)
    with torch.inference_mode():
        logits = torch.cat([model(part, cache=cache) for part in tokens.split(pieces, dim=1)], dim=1)
    torch.testing.assert_close(logits, model(tokens), rtol=1e-4, atol=1e-5)


def test_reordered_sequences_go_on_where_others_were():
    model = _model("llama").eval()
    tokens, rows = _tokens(3, 11), torch.tensor([2, 0, 0, 1])
    cache = model.new_cache(3)
    with torch.inference_mode():
        model(tokens[:, :6], cache=cache)
        cache.reorder(rows)
        after = model(tokens[rows, 6:], cache=cache)
    assert isinstance(cache, DecoderCache)
    assert cache.batch == 4
    torch.testing.assert_close(after, model(tokens)[rows, 6:], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("head", ["bert", "bert-sequence", "bert-token"])
def test_padding_of_a_bert_changes_nothing(head):
    model = _model(head).eval()
    tokens, mask = _tokens(3, 11), _mask(3)
    mask[1] = True
    logits = model(tokens, mask)
    alone = model(tokens[:1, :8])
    first = logits[:1] if head == "bert-sequence" else logits[:1, :8]
    torch.testing.assert_close(alone, first, rtol=1e-4, atol=1e-5)
    assert (model(tokens)[0] - logits[0]).abs().max() > 1e-5


def test_a_bert_sees_both_ways_positions_and_types():
    model = _model("bert").eval()
    tokens, types = _tokens(3, 11), torch.zeros(3, 11, dtype=torch.int64)
    logits = model(tokens)
    assert torch.equal(model(tokens, types=types), logits)
    types[:, 6:] = 1
    assert (model(tokens, types=types) - logits).abs().amax(dim=(-1, 0)).min() > 1e-5
    assert (model(tokens.flip(1)).flip(1) - logits).abs().max() > 1e-3
    tokens[:, 10] = tokens[:, 10] % 60 + 1
    assert (model(tokens)[:, 0] - logits[:, 0]).abs().max() > 1e-5


@pytest.mark.parametrize("name", ["llama", "bert", "bert-token"])
def test_initial_loss_is_that_of_a_guess(name):
    model = _model(name).eval()
    classes = model.head.weight.shape[0]
    assert model.loss(*_loss_arguments(model)).item() == pytest.approx(math.log(classes), abs=0.15)


def test_flops_count_every_product_once():
    llama = _model("llama")
    block = 32 * (4 + 2 * 2) * 12 + 4 * 12 * 32 + 3 * 32 * 96
    assert llama.config.inner_width == 96
    assert llama.flops_per_token(24) == 6 * (2 * block + 61 * 32) + 12 * 2 * 48 * 24 / 2
    block = 4 * 32 * 32 + 2 * 32 * 128
    flops = _model("bert").flops_per_token(10)
    assert flops == pytest.approx(6 * (2 * block + 32 * 32 + 61 * 32) + 12 * 2 * 32 * 10)
    flops = _model("bert-sequence").flops_per_token(10)
    assert flops == pytest.approx(6 * (2 * block + (32 * 32 + 5 * 32) / 10) + 12 * 2 * 32 * 10)


@pytest.mark.parametrize(
    ("config", "options", "message"),
    [
        (
            LlamaConfig,
            {"heads": 4, "kv_heads": 3, "width": 32},
            "heads must be a multiple of kv_heads; got heads 4",
        ),
        (LlamaConfig, {"heads": 4, "width": 36}, "rotary positions need an even head_dim; got 9"),
        (BertConfig, {"heads": 5, "width": 32}, "width must be a multiple of heads; got width 32, heads 5"),
        (BertConfig, {"head": "next"}, "head must be one of masked, sequence, token; got 'next'"),
        (
            BertConfig,
            {"layers": "2"},
            "layers must be int; got '2'",
        ),
        (BertConfig, {"dropout": None}, "dropout must be float; got None"),
        (
            BertConfig,
            {"activation": "swiglu"},
            "activation must be one of gelu, gelu_tanh, relu, silu; got 'swi",
        ),
    ],
)
def test_config_that_does_not_fit_is_refused_in_words(config, options, message):
    with pytest.raises(ValueError, match=f"{config.__name__}: {message}"):
        config(**options)


def test_bad_input_is_refused_in_words():
    long = torch.zeros(1, 25, dtype=torch.int64)
    for name, what in (("llama", "Llama"), ("bert", "Bert")):
        with pytest.raises(ValueError, match=f"{what}: the context is 24 tokens; got 25"):
            _model(name)(long)
    for cls in (Bert, Llama, T5):
        with pytest.raises(
            TypeError, match=f"{cls.__name__}: config must be a {cls.__name__}Config; got dict"
        ):
            cls({})
    bert = _model("bert")
    with pytest.raises(TypeError, match=r"Bert: tokens must be a torch.Tensor \(B, N\) int64; got list"):
        bert([[1, 2]])
    with pytest.raises(ValueError, match=r"Bert: tokens must be \(B, N\) int64; got \(5,\) torch.float32"):
        bert(torch.zeros(5))
    with pytest.raises(
        ValueError, match=r"Bert: mask must be torch.bool \(3, 11\); got torch.bool \(2, 11\)"
    ):
        bert(_tokens(3, 11), _mask(2))
    with pytest.raises(ValueError, match=r"Bert: mask must be torch.bool .*; got torch.int64"):
        bert(_tokens(3, 11), _tokens(3, 11))
    with pytest.raises(
        ValueError, match=r"Bert\.loss: targets must be int64 \(3,\); got torch.int64 \(3, 11\)"
    ):
        _model("bert-sequence").loss(_tokens(3, 11), _tokens(3, 11))


@pytest.mark.parametrize(("cls", "config"), [(GPT, GPTConfig), (Llama, LlamaConfig)])
def test_functional_call_leaves_the_model_as_it_was(cls, config):
    model = cls(config(**SIZES, context=24)).eval()
    tokens = torch.arange(12).view(2, 6)
    before = model(tokens)
    others = {name: 2 * parameter for name, parameter in model.named_parameters()}
    others |= {name: torch.zeros_like(buffer) for name, buffer in model.named_buffers()}
    assert not torch.allclose(torch.func.functional_call(model, others, (tokens,)), before)
    assert torch.equal(model(tokens), before)


def test_a_hook_changes_no_number():
    torch.manual_seed(0)
    model = GPT(GPTConfig(**SIZES, context=24, dropout=0.25))
    tokens = torch.arange(12).view(2, 6)

    def drawn():
        torch.manual_seed(1)
        return model(tokens)

    expected = drawn()
    for part in (model.blocks[0], model.blocks[1].attention_norm):
        part.register_forward_hook(lambda *_: None)
    torch.testing.assert_close(drawn(), expected)
