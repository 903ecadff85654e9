"""The table of constants: the op's default, and what a user's file lays over it."""

import json
import warnings
from pathlib import Path

import pytest
import torch

from lmkern.kernels import tuning

DEFAULT = {"BLOCK_M": 128, "num_warps": 8}
KEY = ("sm_90", "attention", "forward", "2-128")
ABOUT = {"gpu": "NVIDIA H200", "triton": "3.6.0"}


@pytest.fixture(autouse=True)
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's file, not yet there."""
    monkeypatch.delenv("LMKERN_TUNING", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    tuning._chosen.cache_clear()
    tuning._warn_once.cache_clear()
    yield tmp_path / "lmkern" / "tuning.json"
    tuning._chosen.cache_clear()


def found(architecture: str = "sm_90", shape_class: str = "2-128") -> dict[str, int]:
    return tuning.lookup("attention", "forward", architecture, shape_class, DEFAULT)


def test_without_a_file_the_default_holds_and_is_not_shared() -> None:
    found()["BLOCK_M"] = 1
    assert found() == DEFAULT


def test_a_file_overrides_its_own_key_alone(path: Path) -> None:
    tuning.save(path, "sm_90", {KEY: {"BLOCK_M": 64}}, ABOUT)
    assert found() == {"BLOCK_M": 64, "num_warps": 8}
    assert found(shape_class="2-64") == DEFAULT
    assert found("sm_80") == DEFAULT


def test_saving_one_architecture_keeps_the_others(path: Path) -> None:
    other = ("gfx942", *KEY[1:])
    tuning.save(path, "gfx942", {other: {"num_warps": 4}}, ABOUT)
    tuning.save(path, "sm_90", {KEY: {"BLOCK_M": 64}}, ABOUT)
    tuning.save(path, "sm_90", {KEY: {"BLOCK_M": 256}}, ABOUT)
    assert tuning.load(path) == {other: {"num_warps": 4}, KEY: {"BLOCK_M": 256}}
    assert json.loads(path.read_text())["architectures"]["sm_90"]["gpu"] == "NVIDIA H200"


def test_the_environment_names_another_file(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    named = tmp_path / "mine.json"
    tuning.save(named, "sm_90", {KEY: {"BLOCK_M": 32}}, ABOUT)
    assert found() == DEFAULT
    monkeypatch.setenv("LMKERN_TUNING", str(named))
    tuning._chosen.cache_clear()
    assert found()["BLOCK_M"] == 32


def test_a_named_file_that_is_not_there_is_told_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LMKERN_TUNING", str(tmp_path / "typo.json"))
    with pytest.warns(RuntimeWarning, match=r"typo\.json, which is not there"):
        assert found() == DEFAULT
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert found() == DEFAULT


def section(kernels: str) -> str:
    return f'{{"format": 1, "architectures": {{"sm_90": {kernels}}}}}'


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{", "is not JSON"),
        ("[]", "expected format 1; got None"),
        ('{"format": 2}', "expected format 1; got 2"),
        ('{"format": 1}', "expected architectures"),
        (section("{}"), "expected architectures, each with a table"),
        (section('{"kernels": {"a b": {}}}'), "expected 'op kernel shape_class'"),
        (section('{"kernels": {"a b c": {"N": "x"}}}'), "expected integers by name"),
        (section('{"kernels": {"a b c": {"N": true}}}'), "expected integers by name"),
    ],
)
def test_a_broken_file_is_named_and_not_used(path: Path, text: str, reason: str) -> None:
    path.parent.mkdir()
    path.write_text(text)
    with pytest.warns(RuntimeWarning, match="the kernels' defaults are used") as caught:
        assert found() == DEFAULT
    assert reason in str(caught[0].message)
    assert str(path) in str(caught[0].message)


def test_an_entry_of_constants_that_the_kernel_has_not_is_not_used(path: Path) -> None:
    tuning.save(path, "sm_90", {KEY: {"BLOCK_M": 64, "BLOCK_Q": 64}}, ABOUT)
    with pytest.warns(RuntimeWarning, match="sets BLOCK_Q of attention forward"):
        assert found() == DEFAULT


def test_a_search_sees_its_candidate_and_defaults_never_the_file(path: Path) -> None:
    tuning.save(path, "sm_90", {KEY: {"BLOCK_M": 64}}, ABOUT)
    with tuning.override({KEY: {"num_warps": 4}}), tuning.observe() as seen:
        assert found() == {"BLOCK_M": 128, "num_warps": 4}
        assert found(shape_class="2-64") == DEFAULT
    assert seen == {KEY: DEFAULT, (*KEY[:3], "2-64"): DEFAULT}
    with tuning.override({}):
        assert found() == DEFAULT
    assert found()["BLOCK_M"] == 64


def test_architecture_is_the_devices_unless_assumed() -> None:
    assert tuning.architecture(torch.device("cpu")) == "interpreter"
    with tuning.assume("sm_120"):
        assert tuning.architecture(torch.device("cpu")) == "sm_120"
        assert tuning.architecture() == "sm_120"
    assert tuning.shared_memory("sm_120") == 99 * 1024
    assert tuning.shared_memory("of next year") == 64 * 1024
