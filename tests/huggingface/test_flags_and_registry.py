"""Attention without a flag is_causal, and attention that never asks transformers' registry."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

import lmkern
from lmkern.testing.transformers_models import BERT, LLAMA, SMALL, TOLERANCE, batch

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

TEXT = {**BERT, "max_position_embeddings": 64}
VISION = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_global_layers": 1, "attention_heads": 4,
    "intermediate_size": 48, "image_size": 28, "patch_size": 14, "max_num_tiles": 1,
    "supported_aspect_ratios": [[1, 1]], "intermediate_layers_indices": [0, 1], "vision_output_dim": 96,
}  # fmt: skip
WITHOUT_FLAG: dict[str, tuple[str, str, dict[str, Any]]] = {
    "AlignTextSelfAttention": ("AlignTextModel", "AlignTextConfig", TEXT),
    "ClapTextSelfAttention": ("ClapTextModel", "ClapTextConfig", TEXT),
    "DogeAttention": ("DogeModel", "DogeConfig", LLAMA),
    "LayoutLMSelfAttention": ("LayoutLMModel", "LayoutLMConfig", TEXT),
    "MarkupLMSelfAttention": ("MarkupLMModel", "MarkupLMConfig", {**TEXT, "xpath_unit_hidden_size": 4}),
    "SplinterSelfAttention": ("SplinterModel", "SplinterConfig", TEXT),
}
# Not of tokens alone; each has a test of its own below.
OTHERS = {"MllamaVisionAttention", "MllamaTextCrossAttention"}


def _build(model: str, config: str, options: dict[str, Any], implementation: str = "eager") -> Any:
    torch.manual_seed(1)
    cls, made = getattr(transformers, model), getattr(transformers, config)(**options)
    built = cls._from_config(made, attn_implementation=implementation).eval()
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return built


def test_every_attention_without_a_flag_is_tested() -> None:
    models = Path(transformers.__file__).parent / "models"
    found = set()
    for file in models.glob("*/modeling_*.py"):
        for source in re.split(r"\n(?=class |def |@)", file.read_text()):
            named = re.match(r"class (\w*Attention)\(", source)
            if named and "ALL_ATTENTION_FUNCTIONS" in source and "is_causal" not in source:
                found.add(named[1])
    assert found == {*WITHOUT_FLAG, *OTHERS}


@pytest.mark.parametrize("how", ["patched", "registered"])
@pytest.mark.parametrize("name", WITHOUT_FLAG)
def test_attention_without_a_flag_sees_what_its_mask_says(name: str, how: str) -> None:
    model, inputs = _build(*WITHOUT_FLAG[name]), batch("right")
    mask = inputs["attention_mask"].bool()
    given = {key: inputs[key] for key in ("input_ids", "attention_mask")}
    for options in ({"input_ids": given["input_ids"]}, given):
        seen = mask if len(options) == 2 else torch.ones_like(mask)
        with torch.no_grad():
            theirs = model(**options).last_hidden_state[seen]
            if how == "patched":
                patch = lmkern.patch(model, verbose=False)
                assert "attention" in patch.swapped.values()
            else:
                model.set_attn_implementation("lmkern")
            ours = model(**options).last_hidden_state[seen]
        torch.testing.assert_close(ours, theirs, atol=10 * TOLERANCE, rtol=1e-5)
        patch.undo() if how == "patched" else model.set_attn_implementation("eager")


def test_mllamas_images_see_each_other() -> None:
    from transformers.models.mllama.modeling_mllama import MllamaVisionConfig, MllamaVisionModel

    torch.manual_seed(1)
    model = MllamaVisionModel._from_config(MllamaVisionConfig(**VISION), attn_implementation="eager").eval()
    inputs = (torch.randn(1, 1, 1, 3, 28, 28), torch.tensor([[1]]), torch.tensor([[[1]]]))
    with torch.no_grad():
        theirs = model(*inputs).last_hidden_state
        assert "attention" in lmkern.patch(model, verbose=False).swapped.values()
        torch.testing.assert_close(model(*inputs).last_hidden_state, theirs, atol=1e-5, rtol=1e-5)


def test_mllamas_text_sees_the_whole_image_without_a_mask() -> None:
    from transformers.models.mllama.modeling_mllama import MllamaTextConfig, MllamaTextCrossAttention

    torch.manual_seed(1)
    config = MllamaTextConfig(**LLAMA, cross_attention_layers=[1])
    config._attn_implementation = "eager"
    module = MllamaTextCrossAttention(config, 1).eval()
    x, image = torch.randn(2, 5, 32), torch.randn(2, 7, 32)
    theirs = module(x, image)[0]
    lmkern.patch(module, verbose=False)
    torch.testing.assert_close(module(x, image)[0], theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("Bloom", {**SMALL, "hidden_size": 32, "n_layer": 1, "n_head": 4}),
        ("MegatronBert", TEXT),
        ("XGLM", {**SMALL, "d_model": 32, "ffn_dim": 48, "num_layers": 1, "attention_heads": 4}),
    ],
)
def test_models_that_ask_no_registry_are_refused_and_can_be_patched(name: str, options: Any) -> None:
    model, tokens = _build(f"{name}Model", f"{name}Config", options), batch("right")["input_ids"]
    with torch.no_grad():
        theirs = model(tokens).last_hidden_state
        lmkern.patch(model, verbose=False)
        torch.testing.assert_close(model(tokens).last_hidden_state, theirs, atol=1e-5, rtol=1e-5)
        model = _build(f"{name}Model", f"{name}Config", options, "lmkern")
        with pytest.raises(ValueError, match=r"Build it with .* lmkern.patch\(model\)"):
            model(tokens)
        with pytest.raises(ValueError, match=r"lmkern.patch\(model\)"):
            torch.compile(model, backend="eager")(tokens)


def test_a_model_around_anothers_attention_is_served() -> None:
    options = {**TEXT, "projection_dim": 0}
    model, inputs = _build("DPRQuestionEncoder", "DPRConfig", options), batch("right")
    given = {key: inputs[key] for key in ("input_ids", "attention_mask")}
    with torch.no_grad():
        theirs = model(**given).pooler_output
        model.set_attn_implementation("lmkern")
        torch.testing.assert_close(model(**given).pooler_output, theirs, atol=1e-5, rtol=1e-5)
