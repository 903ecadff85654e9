import copy
import json
import warnings

import pytest
import safetensors.torch
import torch

from lmkern.models import (
    GPT,
    T5,
    Bert,
    BertConfig,
    GPTConfig,
    Llama,
    LlamaConfig,
    T5Config,
    from_pretrained,
    save_pretrained,
)
from lmkern.models.pretrained import ARCHITECTURES
from lmkern.models.pretrained.names import to_ours

# Importing it is slow, and its own modules warn of each other.
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import transformers

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

V, N = 61, 13
GPT2_SIZES = {"vocab_size": V, "n_positions": 16, "n_embd": 24, "n_layer": 2, "n_head": 3}
LLAMA_SIZES = {
    "vocab_size": V,
    "max_position_embeddings": 16,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}
BERT_SIZES = {
    "vocab_size": V,
    "max_position_embeddings": 16,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "num_labels": 5,
}
T5_SIZES = {
    "vocab_size": V,
    "d_model": 24,
    "d_kv": 10,
    "d_ff": 40,
    "num_layers": 2,
    "num_decoder_layers": 1,
    "num_heads": 3,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 10,
    "decoder_start_token_id": 3,
}

ROPE = {"rope_theta": 50.0, "rope_type": "default"}
THEIRS = {
    "gpt2": ("GPT2LMHeadModel", GPT2_SIZES),
    "gpt2-relu": ("GPT2LMHeadModel", {**GPT2_SIZES, "activation_function": "relu", "n_inner": 40}),
    "llama": (
        "LlamaForCausalLM",
        {**LLAMA_SIZES, "rope_parameters": {"rope_theta": 50.0, "rope_type": "default"}},
    ),
    "llama-tied": ("LlamaForCausalLM", {**LLAMA_SIZES, "tie_word_embeddings": True}),
    "bert-masked": ("BertForMaskedLM", {**BERT_SIZES, "hidden_act": "gelu_new"}),
    "bert-sequence": ("BertForSequenceClassification", BERT_SIZES),
    "bert-token": ("BertForTokenClassification", {**BERT_SIZES, "classifier_dropout": 0.3}),
    "t5": ("T5ForConditionalGeneration", T5_SIZES),
    "t5-gated": ("T5ForConditionalGeneration", {**T5_SIZES, "feed_forward_proj": "gated-gelu"}),
    "t5-1.1": (
        "T5ForConditionalGeneration",
        {**T5_SIZES, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
    ),
}

SIZES = {"vocab_size": V, "layers": 2, "heads": 3, "width": 24}
DECODER = {**SIZES, "context": 16}
GPT2 = {**DECODER, "positions": "learned", "bias": True, "activation": "gelu_tanh"}
DROPOUT = {"dropout": 0.2, "attention_dropout": 0.3}
LLAMA = {**DECODER, "heads": 4, "kv_heads": 1, "head_width": 8, "rotary_base": 50.0}

OURS = {
    "gpt": lambda: GPT(GPTConfig(**GPT2, **DROPOUT)),
    "llama": lambda: Llama(LlamaConfig(**LLAMA)),
    "llama-tied": lambda: Llama(LlamaConfig(**{**DECODER, "heads": 2}, tied=True)),
    "bert-masked": lambda: Bert(BertConfig(**DECODER)),
    "bert-sequence": lambda: Bert(BertConfig(**DECODER, **DROPOUT, head="sequence", labels=4)),
    "bert-token": lambda: Bert(BertConfig(**DECODER, head="token", labels=4)),
    "t5": lambda: T5(T5Config(**SIZES, buckets=8, max_distance=10, start=3)),
    "t5-untied": lambda: T5(T5Config(**SIZES, activation="geglu_tanh", tied=False, scaled=False)),
    "t5-tied-unscaled": lambda: T5(T5Config(**SIZES, activation="swiglu", scaled=False)),
}


def _theirs(case, **changes):
    name, sizes = THEIRS[case]
    config_class = getattr(transformers, name).config_class
    torch.manual_seed(0)
    return _loud(getattr(transformers, name)(config_class(**{**sizes, **changes})))


def _loud(model):
    """Weights, biases and norms of sizes that show: at the initial ones a mistake can hide in rounding."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(noise * 0.2 + float(parameter.dim() == 1 and name.endswith("weight")))
    return model.eval()


def _inputs():
    generator = torch.Generator().manual_seed(1)
    source, target = (torch.randint(4, V, (3, n), generator=generator) for n in (N, 7))
    mask = torch.ones(3, N, dtype=torch.bool)
    mask[0, 9:] = False
    mask[1, :4] = False
    return source, mask, target


def _both(ours, theirs):
    """Logits of either, at the places that are no padding."""
    source, mask, target = _inputs()
    if isinstance(ours, T5):
        return (
            ours(source, target, mask),
            theirs(input_ids=source, attention_mask=mask.long(), decoder_input_ids=target).logits,
        )
    if isinstance(ours, Bert):
        types = (source > 30).long()
        mine = ours(source, mask, types)
        other = theirs(input_ids=source, attention_mask=mask.long(), token_type_ids=types).logits
        return (mine, other) if ours.config.head == "sequence" else (mine[mask], other[mask])
    return ours(source), theirs(input_ids=source).logits


def _assert_same(ours, theirs):
    """Logits and all gradients.

    Both are float32, with sums of at most 61 terms in another order through at most 3 layers: 1e-5 of the
    largest is some 80 roundings.
    """
    mine, other = _both(ours, theirs)
    assert (mine - other).abs().max() < 1e-5 * other.abs().max()
    direction = torch.randn(mine.shape, generator=torch.Generator().manual_seed(2))
    ours.zero_grad()
    theirs.zero_grad()
    (mine * direction).sum().backward()
    (other * direction).sum().backward()
    gradients = {name: p.grad for name, p in ours.named_parameters()}
    table = ARCHITECTURES[type(theirs).__name__].table(ours.config)
    their_gradients = {name: p.grad for name, p in theirs.named_parameters()}
    for name, expected in to_ours(table, gradients, their_gradients).items():
        assert (gradients[name] - expected).abs().max() < 2e-5 * expected.abs().max(), name


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "model"


@pytest.mark.parametrize("case", THEIRS)
def test_a_model_of_transformers_gives_the_same_here(case, folder):
    theirs = _theirs(case)
    theirs.save_pretrained(folder)
    state = torch.get_rng_state()
    ours = from_pretrained(folder)
    assert torch.equal(torch.get_rng_state(), state)
    assert not ours.training
    _assert_same(ours, theirs)


@pytest.mark.parametrize("case", OURS)
def test_a_model_of_ours_gives_the_same_in_transformers_and_after_a_round_trip(case, folder):
    torch.manual_seed(0)
    ours = _loud(OURS[case]())
    save_pretrained(ours, folder)
    name = json.loads((folder / "config.json").read_text())["architectures"][0]
    theirs, report = getattr(transformers, name).from_pretrained(folder, output_loading_info=True)
    assert not any(report.values()), report
    _assert_same(ours, theirs.eval())
    again = from_pretrained(folder)
    pairs = zip(again.state_dict().items(), ours.state_dict().items(), strict=True)
    assert all(a == b and torch.equal(x, y) for (a, x), (b, y) in pairs)
    assert _written(again, folder / "again") == _written(ours, folder)


def _written(model, folder):
    save_pretrained(model, folder)
    return json.loads((folder / "config.json").read_text())


def test_dropouts_are_those_of_the_config(folder):
    _theirs("gpt2", resid_pdrop=0.2, embd_pdrop=0.2, attn_pdrop=0.3).save_pretrained(folder)
    config = from_pretrained(folder).config
    assert (config.dropout, config.attention_dropout) == (0.2, 0.3)
    _theirs("bert-token", hidden_dropout_prob=0.2, attention_probs_dropout_prob=0.4).save_pretrained(folder)
    config = from_pretrained(folder).config
    assert (config.dropout, config.attention_dropout, config.classifier_dropout) == (0.2, 0.4, 0.3)


def test_an_untied_t5_keeps_both_matrices(folder):
    theirs = _theirs("t5-1.1")
    theirs.save_pretrained(folder)
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = torch.randn(V, 24) * 0.2
    safetensors.torch.save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    ours = from_pretrained(folder)
    assert not ours.config.tied
    _assert_same(ours, transformers.T5ForConditionalGeneration.from_pretrained(folder).eval())


@pytest.mark.parametrize("case", THEIRS)
def test_reads_shards_in_their_dtype_and_writes_the_same_back(case, folder):
    theirs = _theirs(case).bfloat16()
    theirs.save_pretrained(folder, max_shard_size="10KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 1
    ours = from_pretrained(folder)
    assert {p.dtype for p in ours.parameters()} == {torch.bfloat16}
    with torch.no_grad():
        results, expected = _both(ours, theirs), _both(ours.float(), copy.deepcopy(theirs).float())[1]
    errors = [(x - expected).norm() for x in results]
    assert errors[0] <= 1.5 * errors[1]
    save_pretrained(ours.bfloat16(), folder / "back")
    back = type(theirs).from_pretrained(folder / "back", dtype="auto")
    assert all(torch.equal(x, y) for x, y in zip(*map(_values, (back, theirs)), strict=True))


def _values(model):
    return model.state_dict().values()


def test_a_shard_that_is_missing_is_named(folder):
    _theirs("llama").save_pretrained(folder, max_shard_size="10KB")
    next(folder.glob("model-*.safetensors")).unlink()
    with pytest.raises(FileNotFoundError, match=r"from_pretrained: expected the shard .*safetensors"):
        from_pretrained(folder)


def test_an_index_that_leaves_the_folder_is_refused(folder):
    _theirs("llama").save_pretrained(folder)
    index = {"weight_map": {"lm_head.weight": "../other.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="must name files beside it"):
        from_pretrained(folder)


def test_pickle_is_read_only_when_asked_for(folder):
    theirs = _theirs("gpt2")
    theirs.save_pretrained(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"expected .*model\.safetensors or its shards"):
        from_pretrained(folder)
    torch.save(theirs.state_dict(), folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"pickle .* give allow_pickle=True"):
        from_pretrained(folder)
    _assert_same(from_pretrained(folder, allow_pickle=True), theirs)
    for content, message in (
        (b"junk", "expected .*pytorch_model.bin to be a whole pickle of tensors alone; got error"),
        ([1, 2], "must hold names and tensors; got list"),
        ({"model": {"a": torch.ones(2)}}, r"got dict\. Save model\.state_dict\(\) alone"),
        (torch.nn.Linear(2, 2), "tensors alone; got UnpicklingError"),
    ):
        if isinstance(content, bytes):
            (folder / "pytorch_model.bin").write_bytes(content)
        else:
            torch.save(content, folder / "pytorch_model.bin")
        with pytest.raises(ValueError, match=message):
            from_pretrained(folder, allow_pickle=True)


def test_weights_that_are_whole_numbers_are_listed(folder):
    _theirs("llama").save_pretrained(folder)
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"].to(torch.int8)
    safetensors.torch.save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"do not fit.*\n  model\.norm\.weight: floating \| torch\.int8\n"):
        from_pretrained(folder)


def test_reads_the_names_of_old_files(folder):
    """Without the prefix, with buffers and copies that carry nothing, and with gamma and beta."""
    theirs = _theirs("gpt2")
    theirs.save_pretrained(folder)
    tensors = {
        n.removeprefix("transformer."): x for n, x in theirs.state_dict().items() if n != "lm_head.weight"
    }
    tensors["h.0.attn.bias"] = torch.ones(1, 1, 16, 16)
    safetensors.torch.save_file(tensors, folder / "model.safetensors")
    _assert_same(from_pretrained(folder), theirs)

    theirs = _theirs("bert-masked")
    theirs.save_pretrained(folder)
    renamed = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
    tensors = {}
    for name, x in theirs.state_dict().items():
        old = next((name.replace(a, b) for a, b in renamed.items() if a in name), name)
        tensors[old] = x.clone()
    tensors |= {
        "bert.embeddings.position_ids": torch.arange(16)[None],
        "cls.seq_relationship.bias": torch.ones(2),
    }
    tensors["bert.pooler.dense.bias"] = torch.ones(24)
    safetensors.torch.save_file(tensors, folder / "model.safetensors")
    _assert_same(from_pretrained(folder), theirs)


def test_copies_that_differ_are_refused(folder):
    theirs = _theirs("gpt2")
    theirs.save_pretrained(folder)
    tensors = {
        **safetensors.torch.load_file(folder / "model.safetensors"),
        "lm_head.weight": torch.zeros(V, 24),
    }
    safetensors.torch.save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"lm_head\.weight and transformer\.wte\.weight are one matrix"):
        from_pretrained(folder)


def test_tensors_that_do_not_fit_are_listed_side_by_side(folder):
    _theirs("bert-sequence").save_pretrained(folder)
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    del tensors["classifier.bias"]
    tensors["extra"] = torch.zeros(3)
    tensors["bert.encoder.layer.1.attention.self.key.weight"] = torch.zeros(24, 23)
    safetensors.torch.save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ValueError, match="do not fit") as caught:
        from_pretrained(folder)
    message = str(caught.value)
    for line in (
        "classifier.bias: (5,) | -",
        "extra: - | (3,)",
        "bert.encoder.layer.1.attention.self.key.weight: (24, 24) | (24, 23)",
    ):
        assert f"  {line}\n" in message
    assert "layer.0" not in message


LLAMA3 = {"rope_type": "llama3", "factor": 8.0}


@pytest.mark.parametrize(
    ("case", "changes", "message"),
    [
        (
            "llama",
            {"rope_scaling": LLAMA3},
            r"rope_scaling: expected rope_type 'default'; got \{'rope_type': 'll",
        ),
        ("llama", {"rope_parameters": {"rope_type": "yarn"}}, "rope_parameters: .*'yarn'"),
        (
            "llama",
            {"attention_bias": True, "mlp_bias": True},
            "attention_bias: .*\n  mlp_bias: expected False",
        ),
        (
            "gpt2",
            {"scale_attn_by_inverse_layer_idx": True},
            "scale_attn_by_inverse_layer_idx: expected False",
        ),
        ("llama", {"quantization_config": {"quant_method": "gptq"}}, "quantization_config: .*'gptq'"),
        ("gpt2", {"embd_pdrop": 0.3}, "embd_pdrop: expected 0.1; got 0.3"),
        ("gpt2", {"activation_function": "mish"}, "activation_function: expected gelu or .*; got 'mish'"),
        (
            "bert-masked",
            {"position_embedding_type": "relative_key"},
            "position_embedding_type: expected 'abs",
        ),
        ("bert-sequence", {"id2label": {"0": "size"}}, "id2label: expected at least 2 labels"),
        ("t5", {"feed_forward_proj": "gated-tanh"}, "feed_forward_proj: expected relu or .*'gated-tanh'"),
        ("t5", {"eos_token_id": [1, 2]}, r"eos_token_id: expected one token; got \[1, 2\]"),
    ],
)
def test_what_the_config_asks_for_and_is_not_served_is_named(case, changes, message, folder):
    _theirs(case).save_pretrained(folder)
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**values, **changes}))
    with pytest.raises(ValueError, match=r"(?s)is not served here\n  " + message):
        from_pretrained(folder)


def test_an_unknown_architecture_is_named_beside_those_known(folder):
    _theirs("gpt2").save_pretrained(folder)
    (folder / "config.json").write_text('{"architectures": ["MambaForCausalLM"]}')
    with pytest.raises(
        ValueError, match="is of architecture MambaForCausalLM; known are BertForMaskedLM"
    ) as caught:
        from_pretrained(folder)
    assert all(name in str(caught.value) for name in ARCHITECTURES)
    (folder / "config.json").write_text('{"model_type": "mamba"}')
    with pytest.raises(ValueError, match=r"none \(model_type 'mamba'\)"):
        from_pretrained(folder)


def test_a_name_goes_to_the_hub_and_a_path_does_not(folder, monkeypatch):
    theirs = _theirs("gpt2")
    theirs.save_pretrained(folder)
    asked = []
    monkeypatch.setattr(
        "huggingface_hub.snapshot_download", lambda name, **_: asked.append(name) or str(folder)
    )
    _assert_same(from_pretrained("openai-community/gpt2"), theirs)
    assert asked == ["openai-community/gpt2"]
    for missing in (str(folder / "no"), "./no", "a/b/c"):
        with pytest.raises(FileNotFoundError, match="from_pretrained: expected a folder"):
            from_pretrained(missing)
    assert len(asked) == 1


def test_what_transformers_has_no_class_for_is_not_written(folder):
    with pytest.raises(ValueError, match="a GPT is a GPT-2 with positions 'learned', bias True"):
        save_pretrained(GPT(GPTConfig(vocab_size=5, width=4, heads=2, layers=1)), folder)
    with pytest.raises(ValueError, match="T5 has no activation 'relu_squared'"):
        save_pretrained(
            T5(T5Config(vocab_size=5, width=4, heads=2, layers=1, activation="relu_squared")), folder
        )
    with pytest.raises(TypeError, match="expected an lmkern Bert, GPT, Llama or T5; got Linear"):
        save_pretrained(torch.nn.Linear(2, 2), folder)
    assert not folder.exists()
