"""What doctor says of the machine."""

import platform

from lmkern.machine import hardware, instruction_sets, name_processor, version, versions


def test_versions_name_python_and_what_is_missing() -> None:
    assert versions()["python"] == platform.python_version()
    assert version("torch") != "not installed"
    assert version("no-such-package-anywhere") == "not installed"


def test_instruction_sets_are_those_among_the_flags() -> None:
    assert instruction_sets({"flags": "fpu sse4_2 avx2 xyz amx_bf16"}) == "sse4_2 avx2 amx_bf16"
    assert instruction_sets({}) != ""


def test_hardware_is_said_in_words() -> None:
    facts = hardware()
    assert all(isinstance(value, str) and value for value in facts.values())
    assert {"processor", "instruction sets", "threads", "memory", "accelerator"} <= set(facts)


def test_a_processor_whose_name_tells_nothing_is_named_by_its_numbers() -> None:
    kind = {"cpu family": "26", "model": "2"}
    assert name_processor({"model name": "AMD EPYC", **kind}) == "AMD EPYC family 26 model 2"
    assert name_processor({"model name": "AMD EPYC 9654", **kind}) == "AMD EPYC 9654"
    assert name_processor({"model name": "AMD EPYC"}) == "AMD EPYC"
    assert name_processor({}) is None
