"""What a run records of the instruction sets that both sides are held to."""

from __future__ import annotations

import pytest
import torch

from benchmarks import machine

ALL = ("LMKERN_CPU_ISA", *machine.TORCH_LIMITS)


@pytest.mark.parametrize("missing", ALL)
def test_holding_one_side_alone_is_refused(monkeypatch: pytest.MonkeyPatch, missing: str) -> None:
    for name in ALL:
        monkeypatch.setenv(name, "avx2")
    assert machine.one_sided_limit() is None
    monkeypatch.delenv(missing)
    reason = machine.one_sided_limit()
    assert reason is not None
    assert f"without {missing};" in reason


def test_limits_are_recorded_where_there_are_any(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ALL:
        monkeypatch.delenv(name, raising=False)
    assert machine.one_sided_limit() is None
    assert machine.torch_limits() == {}
    monkeypatch.setenv("ATEN_CPU_CAPABILITY", "avx2")
    assert machine.torch_limits() == {"torch held to": "ATEN_CPU_CAPABILITY=avx2"}


def test_what_torch_multiplies_slowly_has_the_ceiling_of_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "copy_bandwidth", lambda device: 5.0)
    products = {"float32": 2.0, "bfloat16": 1.0}
    assert machine.ceilings(torch.device("cpu"), products) == {"float32": 2.0, "bfloat16": 2.0, "copy": 5.0}
