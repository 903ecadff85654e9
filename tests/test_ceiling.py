import pytest
import torch

from lmkern import ceiling
from lmkern.ceiling import choose_device, choose_dtype, measure_ceiling

CPU = torch.device("cpu")


def test_ceiling_counts_two_operations_for_each_product_term(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []

    def product(device: torch.device, dtype: torch.dtype, size: int, tries: int) -> float:
        sizes.append(size)
        return size**3 / 1e10

    monkeypatch.setattr(ceiling, "_product_seconds", product)
    assert measure_ceiling(CPU, torch.float32) == pytest.approx(2e10)
    # 512 cubed takes 13 ms at this rate and 1024 cubed 107 ms: no larger one is tried.
    assert sizes == [256, 512, 1024, 1024]


def test_ceiling_of_this_machine_is_plausible() -> None:
    assert 1e8 < measure_ceiling(CPU, torch.float32, tries=1) < 1e15


@pytest.mark.parametrize(("gain", "chosen"), [(1.4, torch.float32), (1.6, torch.bfloat16)])
def test_bfloat16_is_taken_only_where_it_pays(
    gain: float, chosen: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    rates = {torch.float32: 1e9, torch.bfloat16: gain * 1e9}
    monkeypatch.setattr(ceiling, "measure_ceiling", lambda device, dtype, tries: rates[dtype])
    assert choose_dtype(CPU) is chosen


def test_named_device_is_taken() -> None:
    assert choose_device("cpu") == CPU


@pytest.mark.parametrize("name", ["gpu", "cuda:99"])
def test_a_device_that_is_not_there_is_refused_in_words(name: str) -> None:
    with pytest.raises(
        ValueError, match=f"device must be auto or one that this torch can use; got '{name}': "
    ):
        choose_device(name)
