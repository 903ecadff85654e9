import hashlib
import json

import pytest
import safetensors.torch
import torch

from lmkern.models import GPT, GPTConfig, Transformer, load, save

CONFIG = GPTConfig(
    vocab_size=31, context=8, layers=2, heads=2, kv_heads=1, width=8, positions="learned", bias=True
)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return GPT(CONFIG).eval()


@pytest.fixture
def folder(model, tmp_path):
    save(model, tmp_path / "model")
    return tmp_path / "model"


def _rewrite(folder, **changes):
    """config.json with fields changed."""
    description = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**description, **changes}))


def _replace_tensors(folder, tensors):
    """model.safetensors with other tensors, and a config.json that vouches for it."""
    path = folder / "model.safetensors"
    safetensors.torch.save_file(tensors, path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    _rewrite(folder, files={path.name: {"bytes": path.stat().st_size, "sha256": digest}})


def test_loads_what_was_saved(model, folder):
    tokens = torch.randint(31, (2, 8))
    loaded = load(folder)
    assert loaded.config == CONFIG
    assert not loaded.training
    assert loaded.head.weight is loaded.embedding.weight
    torch.testing.assert_close(loaded(tokens), model(tokens), rtol=0, atol=0)


def test_dtype_is_kept(model, tmp_path):
    save(model.bfloat16(), tmp_path)
    assert {p.dtype for p in load(tmp_path).parameters()} == {torch.bfloat16}


def test_the_tutorials_model_too(tmp_path):
    model = Transformer(11, 7, 8, 2, 1, dropout=0.2).eval()
    save(model, tmp_path)
    tokens = torch.randint(11, (2, 5))
    torch.testing.assert_close(load(tmp_path)(tokens), model(tokens), rtol=0, atol=0)


def test_description_is_the_documented_one(folder):
    assert {path.name for path in folder.iterdir()} == {"model.safetensors", "config.json"}
    description = json.loads((folder / "config.json").read_text())
    weights = (folder / "model.safetensors").read_bytes()
    assert description.pop("config") == CONFIG.__dict__
    assert description == {
        "format": "lmkern-model",
        "version": 1,
        "architecture": "GPT",
        "files": {
            "model.safetensors": {"bytes": len(weights), "sha256": hashlib.sha256(weights).hexdigest()}
        },
    }


def test_files_beside_the_weights_are_copied_and_checked_on_loading(model, tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    save(model, tmp_path / "model", beside=[tmp_path / "tokenizer.json"])
    (tmp_path / "tokenizer.json").unlink()
    load(tmp_path / "model")
    (tmp_path / "model" / "tokenizer.json").write_text("[]")
    with pytest.raises(ValueError, match=r"load: .*tokenizer\.json is altered"):
        load(tmp_path / "model")
    (tmp_path / "model" / "tokenizer.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"load: expected .*tokenizer\.json"):
        load(tmp_path / "model")


def test_saving_again_replaces_and_leaves_other_files(model, folder):
    (folder / "tokenizer.json").write_text("{}")
    with torch.no_grad():
        model.norm.weight.fill_(2.0)
    save(model, folder)
    assert (load(folder).norm.weight == 2.0).all()
    assert (folder / "tokenizer.json").read_text() == "{}"


def test_a_save_that_fails_leaves_the_old_model(model, folder, monkeypatch):
    before = load(folder).state_dict()
    monkeypatch.setattr(json, "dumps", lambda *_a, **_k: (_ for _ in ()).throw(OSError("disk full")))
    with torch.no_grad():
        model.norm.weight.fill_(2.0)
    with pytest.raises(OSError, match="disk full"):
        save(model, folder)
    monkeypatch.undo()
    torch.testing.assert_close(dict(load(folder).state_dict()), dict(before), rtol=0, atol=0)


def test_a_model_that_its_configuration_does_not_make_is_refused_before_writing(model, folder):
    untied = load(folder)
    untied.head.weight = torch.nn.Parameter(torch.randn_like(untied.embedding.weight))
    with pytest.raises(ValueError, match=r"save: .*got others: head\.weight\. Undo what changed"):
        save(untied, folder)
    wrapped = load(folder)
    wrapped.blocks[0] = torch.nn.Sequential(wrapped.blocks[0])
    with pytest.raises(ValueError, match=r"got others: blocks\.0\.0\..* \.\.\.\. Undo"):
        save(wrapped, folder)
    torch.testing.assert_close(load(folder).head.weight, model.head.weight, rtol=0, atol=0)


def test_loading_leaves_the_random_state_alone(folder):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    load(folder)
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("damage", ["cut", "flipped"])
def test_a_damaged_file_is_refused_by_name_and_checksums(folder, damage):
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    damaged = whole[:-1] if damage == "cut" else whole[:-1] + bytes([whole[-1] ^ 1])
    path.write_bytes(damaged)
    with pytest.raises(ValueError, match=r"load: .*model\.safetensors is .*altered: expected") as caught:
        load(folder)
    for content in (whole, damaged):
        assert hashlib.sha256(content).hexdigest() in str(caught.value)
        assert f"{len(content)} bytes" in str(caught.value)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_missing_file_is_named(folder, name):
    (folder / name).unlink()
    with pytest.raises(FileNotFoundError, match=f"load: expected .*{name}; there is no such file"):
        load(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": "other"}, "must have format 'lmkern-model'; got 'other'"),
        ({"version": 2}, "must have version 1; got 2"),
        ({"architecture": "BERT"}, "architecture must be Bert, GPT, Llama, T5 or Transformer; got 'BERT'"),
        ({"files": None}, "lacks files"),
        ({"config": {"widht": 8}}, "config does not describe a GPT: .*widht"),
        ({"config": {"width": 7}}, "GPTConfig: width must be a multiple of heads"),
        ({"files": {}}, "lacks the checksum of model.safetensors"),
    ],
)
def test_another_description_is_refused_in_words(folder, changes, message):
    _rewrite(folder, **changes)
    with pytest.raises(ValueError, match=message):
        load(folder)


@pytest.mark.parametrize("text", ["{", "[]", "\x00\xff"])
def test_a_description_that_is_none_is_refused(folder, text):
    (folder / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=r"load: .*config\.json"):
        load(folder)


def test_tensors_that_do_not_fit_are_listed_side_by_side(folder):
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    del tensors["norm.weight"]
    tensors["extra"] = torch.zeros(3)
    tensors["embedding.weight"] = torch.zeros(30, 8)
    _replace_tensors(folder, tensors)
    with pytest.raises(ValueError, match="do not fit") as caught:
        load(folder)
    for line in ("norm.weight: (8,) | -", "extra: - | (3,)", "embedding.weight: (31, 8) | (30, 8)"):
        assert f"  {line}\n" in str(caught.value)
    assert "blocks." not in str(caught.value)


def test_another_kind_of_model_is_refused(tmp_path):
    with pytest.raises(
        TypeError, match="save: expected an lmkern Bert, GPT, Llama, T5 or Transformer; got Linear"
    ):
        save(torch.nn.Linear(2, 2), tmp_path / "model")
    assert not (tmp_path / "model").exists()
