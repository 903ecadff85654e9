"""transformers' models on lmkern's kernels: padding, position bias, loss, generation, Trainer and undo."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

import lmkern
from lmkern.testing.transformers_models import (
    BERT,
    DECODERS,
    ENCODER_DECODER,
    LLAMA,
    MODELS,
    SMALL,
    T5,
    TOLERANCE,
    assert_same,
    batch,
    make,
    results,
)

transformers = pytest.importorskip("transformers", reason="transformers is not installed")


@pytest.mark.parametrize("padding", ["none", "left", "right"])
@pytest.mark.parametrize("name", MODELS)
def test_patched_models_agree_with_eager_attention_and_undo(name: str, padding: str) -> None:
    model, inputs = make(name), batch(padding)
    theirs = results(model, inputs)
    patch = lmkern.patch(model, verbose=False)
    assert {"loss without logits", "attention", "feed-forward"} <= set(patch.swapped.values())
    assert not lmkern.patch(model, verbose=False).swapped
    assert model(**inputs).logits is None
    assert_same(results(model, inputs), theirs)
    patch.undo()
    again = results(model, inputs)
    assert torch.equal(again[0], theirs[0]) and torch.equal(again[1], theirs[1])
    assert model.config._attn_implementation == "eager"


@pytest.mark.parametrize("name", MODELS)
def test_a_patched_model_is_saved_and_copied_whole(name: str, tmp_path: Path) -> None:
    model, inputs = make(name), batch("right")
    swapped = lmkern.patch(model, verbose=False).swapped
    torch.save(model, tmp_path / "model.pt")
    loaded = torch.load(tmp_path / "model.pt", weights_only=False)
    theirs = results(model, inputs)
    for other in (loaded, copy.deepcopy(model)):
        classes = [(path, type(module)) for path, module in other.named_modules()]
        assert classes == [(path, type(module)) for path, module in model.named_modules()]
        assert not set(lmkern.patch(other, verbose=False).swapped) & set(swapped)
        ours = results(other, inputs)
        assert torch.equal(ours[0], theirs[0]) and torch.equal(ours[1], theirs[1])
        assert all(torch.equal(ours[2][key], gradient) for key, gradient in theirs[2].items())


def test_who_listens_to_t5s_table_of_positions_is_told() -> None:
    model, inputs = make("t5"), batch("right")
    theirs = results(model, inputs)
    lmkern.patch(model, verbose=False)
    tables = [module for path, module in model.named_modules() if path.endswith("relative_attention_bias")]
    heard: list[Tensor] = []
    for table in tables:
        table.register_forward_hook(lambda _module, _inputs, output: heard.append(output))
    assert_same(results(model, inputs), theirs)
    # The encoder's and the decoder's, in training and in evaluation.
    assert len(heard) == 4
    tables[0].register_forward_hook(lambda _module, _inputs, output: output + output)
    assert not torch.equal(results(model, inputs)[1], theirs[1])


@pytest.mark.parametrize("padding", ["none", "left", "right"])
@pytest.mark.parametrize("name", MODELS)
def test_the_registered_attention_alone_agrees_with_eager(name: str, padding: str) -> None:
    from lmkern.huggingface import register

    register()
    model, inputs = make(name), batch(padding)
    theirs = results(model, inputs)
    model.set_attn_implementation("lmkern")
    assert_same(results(model, inputs), theirs)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("name", DECODERS)
def test_generate_writes_the_same_tokens(name: str, cache: str) -> None:
    model, inputs = make(name).eval(), batch("left")
    del inputs["labels"]
    options = {"do_sample": False, "max_new_tokens": 8, "min_new_tokens": 8, "disable_compile": True}
    if cache == "static":
        options["cache_implementation"] = "static"
    theirs = model.generate(**inputs, **options)
    lmkern.patch(model, verbose=False)
    assert torch.equal(model.generate(**inputs, **options), theirs)


def test_generation_reads_every_weight_by_the_kernel_of_few_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    from lmkern.kernels.linear import cpu

    model = make("llama").eval()
    lmkern.patch(model, verbose=False)
    theirs, taken = cpu.forward, []

    def forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        taken.append(weight)
        return theirs(x, weight, bias)

    monkeypatch.setattr(cpu, "forward", forward)
    with torch.no_grad():
        model(torch.tensor([[3]]))
    weights = [module.weight for module in model.modules() if isinstance(module, torch.nn.Linear)]
    assert len(weights) == 15
    assert {id(weight) for weight in taken} == {id(weight) for weight in weights}


@pytest.mark.parametrize(
    ("name", "path"), [("llama", "model.layers.0.mlp.act_fn"), ("gpt2", "transformer.h.0.mlp.act")]
)
def test_an_activation_of_ones_own_is_asked(name: str, path: str) -> None:
    model, inputs = make(name).eval(), batch("right")
    swapped = copy.deepcopy(model)
    parent, _, place = path.rpartition(".")
    lmkern.patch(swapped, verbose=False)
    for other in (torch.nn.ReLU(), torch.nn.GELU(), torch.nn.GELU(approximate="tanh")):
        for each in (model, swapped):
            setattr(each.get_submodule(parent), place, other)
        with torch.no_grad():
            torch.testing.assert_close(swapped(**inputs).loss, model(**inputs).loss, rtol=0, atol=TOLERANCE)
    hooked, called = make(name).eval(), []
    lmkern.patch(hooked, verbose=False)
    hooked.get_submodule(path).register_forward_hook(lambda *_: called.append(1))
    hooked(**inputs)
    assert called
    before, called = make(name).eval(), []
    before.get_submodule(path).register_forward_hook(lambda *_: called.append(1))
    left = lmkern.patch(before, verbose=False).left
    assert "has hooks or a forward of its own" in left[parent]
    assert not called


def test_attention_that_takes_other_arguments_than_t5s_is_left() -> None:
    torch.manual_seed(1)
    model = transformers.UMT5ForConditionalGeneration(transformers.UMT5Config(**T5)).eval()
    tokens = torch.randint(3, 67, (2, 11))
    theirs = model(input_ids=tokens, decoder_input_ids=tokens).logits
    left = lmkern.patch(model, verbose=False).left
    assert "UMT5Attention takes other arguments than T5's attention" in left.values()
    ours = model(input_ids=tokens, decoder_input_ids=tokens).logits
    torch.testing.assert_close(ours, theirs, atol=TOLERANCE, rtol=1e-5)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("BigBirdPegasusForCausalLM", {**ENCODER_DECODER, "attention_type": "original_full"}),
        ("NllbMoeForConditionalGeneration", {**ENCODER_DECODER, "num_experts": 2}),
    ],
)
def test_decoders_that_are_causal_by_their_mask_alone_are_left(name: str, options: dict[str, Any]) -> None:
    torch.manual_seed(1)
    config = getattr(transformers, name.partition("For")[0] + "Config")(**options)
    model = getattr(transformers, name)(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3 if parameter.dim() > 1 else 1)
        tokens = torch.randint(3, 67, (2, 16))
        theirs = model(input_ids=tokens, labels=tokens).loss
        left = lmkern.patch(model, verbose=False).left
        assert any(text.startswith("it does not say that it is causal") for text in left.values())
        torch.testing.assert_close(model(input_ids=tokens, labels=tokens).loss, theirs, atol=0, rtol=1e-5)


def test_a_norm_that_takes_other_tensors_is_left() -> None:
    options = {"hidden_size": 32, "num_blocks": 1, "num_heads": 4, "chunk_size": 8}
    model = transformers.xLSTMForCausalLM(transformers.xLSTMConfig(**SMALL, **options))
    left = lmkern.patch(model, verbose=False).left.values()
    assert "xLSTMMultiHeadLayerNorm computes no RMS norm that lmkern.rms_norm knows" in left


def test_scores_with_options_that_are_not_ours_are_left() -> None:
    from transformers.models.inkling2 import modeling_inkling2 as file

    from lmkern.huggingface.attention_modules import swap_attention

    module = torch.nn.Module()
    module.__class__ = file.Inkling2FullAttention
    assert swap_attention(module) == "its scores take sinks, which lmkern's do not"


@pytest.mark.parametrize("name", sorted(transformers.activations.ACT2FN))
def test_an_activation_is_the_same_far_from_zero(name: str) -> None:
    from transformers.models.bert.modeling_bert import BertIntermediate

    torch.manual_seed(1)
    module = BertIntermediate(transformers.BertConfig(**{**BERT, "hidden_act": name})).eval()
    for scale in (1, 100, 10_000):
        x = torch.randn(3, 32) * scale
        with torch.no_grad():
            theirs = module(x)
            patch = lmkern.patch(module, verbose=False)
            torch.testing.assert_close(module(x), theirs, atol=1e-5, rtol=1e-5)
        patch.undo()


def test_what_is_left_of_a_model_is_listed_with_the_reason() -> None:
    config = transformers.MixtralConfig(**{**LLAMA, "num_hidden_layers": 1}, num_local_experts=2)
    model = transformers.MixtralForCausalLM(config)
    text = str(lmkern.patch(model, verbose=False))
    assert "swapped loss without logits x 1, Embedding x 1, attention x 1, Linear x 4, RMS norm x 3" in text
    assert "left model.layers.0.mlp.experts: MixtralExperts has an activation between parts" in text


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["gpt2", "llama", "bert", "t5"])
def test_under_autocast_gradients_are_as_near_to_those_of_float32_as_sdpas(
    name: str, dtype: torch.dtype
) -> None:
    model, inputs = make(name, "sdpa"), batch("right")

    def gradients(enabled: bool) -> Tensor:
        with torch.autocast("cpu", dtype, enabled=enabled):
            loss = model(**inputs).loss
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])

    exact, theirs = gradients(False), gradients(True)
    lmkern.patch(model, verbose=False)
    ours = gradients(True)
    assert ours.dtype == torch.float32
    assert (ours - exact).norm() <= 1.5 * (theirs - exact).norm()


def test_num_items_in_batch_divides_the_sum() -> None:
    model, inputs = make("gpt2"), batch("right")
    theirs = results(model, inputs, num_items_in_batch=torch.tensor(50))
    lmkern.patch(model, verbose=False)
    assert_same(results(model, inputs, num_items_in_batch=torch.tensor(50)), theirs)


def test_gradient_checkpointing() -> None:
    model, inputs = make("llama"), batch("right")
    theirs = results(model, inputs)
    lmkern.patch(model, verbose=False)
    # The older name is deprecated where the newer stands.
    older, name = "gradient_checkpointing_enable", "activation_checkpointing_enable"
    getattr(model, name if hasattr(model, name) else older)()
    assert_same(results(model, inputs), theirs)


def test_inductor_compiles_a_patched_model_whole_and_once_for_all_batches() -> None:
    torch.compiler.reset()
    model = make("gpt2", n_layer=1)
    lmkern.patch(model, verbose=False)
    counter = CompileCounterWithBackend("inductor")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    for count in (3, 2, 5):
        inputs = batch("right", count)
        for tensor in inputs.values():
            torch._dynamo.mark_dynamic(tensor, 0)
        losses = [call(**inputs).loss for call in (compiled, model)]
        torch.testing.assert_close(*losses)
        gradients = [torch.autograd.grad(loss, list(model.parameters())) for loss in losses]
        torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)
    assert counter.frame_count == 1


def test_a_compiler_gets_the_whole_mask_of_a_window() -> None:
    from transformers.masking_utils import sliding_window_causal_mask_function

    from lmkern.huggingface import lmkern_mask

    def mask(x: Tensor) -> Tensor:
        options: dict[str, Any] = {"q_length": 11, "kv_length": 11}
        options["mask_function"] = sliding_window_causal_mask_function(4)
        assert torch.compiler.is_compiling() or lmkern_mask(x.shape[0], **options) is None
        return x if (found := lmkern_mask(x.shape[0], **options)) is None else found

    torch.compiler.reset()
    x = torch.ones(3)
    assert torch.equal(mask(x), x)
    seen = torch.ones(11, 11, dtype=torch.bool).tril().triu(-3)
    compiled = torch.compile(mask, backend="eager", fullgraph=True)
    assert torch.equal(compiled(x), seen.expand(3, 1, 11, 11))


@pytest.mark.parametrize("name", ["gpt2", "t5"])
def test_inference_of_a_patched_model_exports(name: str) -> None:
    model, inputs = make(name).eval(), batch("right")
    tokens = inputs.pop("labels").abs().clamp(max=66)
    lmkern.patch(model, verbose=False)
    inputs |= {"decoder_input_ids": tokens} if name == "t5" else {}
    with torch.no_grad():
        exported = torch.export.export(model, (), {**inputs, "use_cache": False}).module()
        logits = [call(**inputs, use_cache=False).logits for call in (exported, model)]
    torch.testing.assert_close(*logits)


def test_trainer_takes_the_same_steps(tmp_path: Path) -> None:
    pytest.importorskip("accelerate", reason="accelerate is not installed")
    inputs = batch("right")
    data = [{key: value[i] for key, value in inputs.items()} for i in range(3)] * 2

    def losses(patched: bool) -> list[float]:
        model = make("gpt2")
        if patched:
            lmkern.patch(model, verbose=False)
        options = transformers.TrainingArguments(
            output_dir=str(tmp_path), max_steps=3, per_device_train_batch_size=2, report_to=[],
            gradient_accumulation_steps=2, logging_steps=1, save_strategy="no", use_cpu=True,
            disable_tqdm=True,
        )  # fmt: skip
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            trainer = transformers.Trainer(model=model, args=options, train_dataset=data)
            trainer.train()
        return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

    theirs = losses(False)
    assert len(theirs) == 3
    assert losses(True) == pytest.approx(theirs, abs=1e-4)


def test_masks_say_no_more_than_they_must() -> None:
    from lmkern.huggingface import lmkern_mask

    sizes: dict[str, Any] = {"batch_size": 3, "q_length": 11, "kv_length": 11}
    padded = batch("left")["attention_mask"].bool()
    assert lmkern_mask(**sizes) is None
    assert lmkern_mask(**sizes, attention_mask=torch.ones(3, 11, dtype=torch.bool)) is None
    mask = lmkern_mask(**sizes, attention_mask=padded)
    assert mask is not None and torch.equal(mask, padded[:, None, None])
    full = lmkern_mask(batch_size=3, q_length=4, kv_length=11)
    assert full is not None and full.shape == (3, 1, 4, 11)


def test_a_query_that_sees_no_key_gives_zeros() -> None:
    from lmkern.huggingface import lmkern_attention, lmkern_mask

    padded = batch("left")["attention_mask"].bool()
    mask = lmkern_mask(batch_size=3, q_length=11, kv_length=11, attention_mask=padded)
    q, k, v = (torch.randn(3, 4, 11, 8, requires_grad=True) for _ in range(3))
    out, _ = lmkern_attention(torch.nn.Identity(), q, k, v, mask, is_causal=True)
    assert not out[1, :4].any() and out[1, 4:].all()
    out.sum().backward()
    assert q.grad is not None and not q.grad[1, :, :4].any()
    assert v.grad is not None and not v.grad[1, :, :4].any() and v.grad[1, :, 4:].all()


def test_a_transformers_whose_t5_asks_no_registry_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from lmkern.huggingface import register

    monkeypatch.setattr("transformers.__version__", "5.14.2")
    with pytest.raises(ImportError, match=r"expected transformers 5\.15 or later.*got 5\.14\.2"):
        register()


def test_attention_weights_are_refused() -> None:
    from lmkern.huggingface import lmkern_attention

    q = torch.randn(1, 1, 2, 4)
    with pytest.raises(ValueError, match="output_attentions=True"):
        lmkern_attention(torch.nn.Identity(), q, q, q, None, output_attentions=True)


class Adapter(torch.nn.Module):
    """A map and something added to it, with the map's weight for its own, as adapters have it."""

    def __init__(self, base: Any) -> None:
        super().__init__()
        self.base, self.weight, self.bias = base, base.weight, base.bias

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.base(x).sin()


@pytest.mark.parametrize(
    ("name", "paths"),
    [
        ("gpt2", ["transformer.h.0.mlp.c_fc", "lm_head"]),
        ("t5", ["encoder.block.0.layer.1.DenseReluDense.wi", "lm_head"]),
    ],
)
def test_what_took_a_maps_place_after_the_patch_is_called(name: str, paths: list[str]) -> None:
    losses = []
    for patches in (False, True):
        model = make(name)
        if patches:
            lmkern.patch(model, verbose=False)
        for path in paths:
            model.set_submodule(path, Adapter(model.get_submodule(path)))
        tokens = torch.arange(3, 25).view(2, 11)
        losses.append(model(input_ids=tokens, labels=tokens).loss)
    torch.testing.assert_close(*losses)
