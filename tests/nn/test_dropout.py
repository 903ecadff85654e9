import pytest
import torch

from lmkern.kernels.philox import keep_scale
from lmkern.nn import Dropout


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1003, 77), (5,), (0, 4)])
def test_dropped_elements_are_zero_and_the_others_scaled_and_so_are_gradients(
    shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    x = torch.ones(shape, dtype=dtype, requires_grad=True)
    y = Dropout(0.3)(x)
    y.backward(torch.full_like(y, 2.0))
    scale = torch.tensor(keep_scale(0.3), dtype=dtype)
    assert y.dtype == dtype and y.shape == shape
    assert x.grad is not None and torch.equal(x.grad, 2 * y)
    assert set(y.detach().flatten().tolist()) <= {0.0, scale.item()}
    if y.numel() > 1000:
        assert (y == 0).float().mean().item() == pytest.approx(0.3, abs=0.005)


def test_elements_are_dropped_independently_of_their_neighbours() -> None:
    dropped = (Dropout(0.3)(torch.ones(400_000)) == 0).double()
    for distance in (1, 2, 3, 4, 5):
        both = (dropped[distance:] * dropped[:-distance]).mean().item()
        assert both == pytest.approx(0.09, abs=0.002)


def test_the_generator_decides_the_mask() -> None:
    x, dropout = torch.ones(50), Dropout(0.5)
    torch.manual_seed(1)
    first = dropout(x)
    assert not torch.equal(first, dropout(x))
    torch.manual_seed(1)
    assert torch.equal(first, dropout(x))


def test_nothing_is_dropped_where_there_is_nothing_to_drop() -> None:
    x = torch.randn(9)
    assert Dropout(0.0)(x) is x
    assert Dropout(0.5).eval()(x) is x
    assert torch.equal(Dropout(1.0)(x), torch.zeros(9))
    y = torch.ones(9)
    assert Dropout(0.5, inplace=True)(y) is y


@pytest.mark.parametrize("p", [1e-6, 0.99998, 0.99999, 0.999999])
def test_the_mean_is_kept_for_every_probability_as_rounded(p: float) -> None:
    y = Dropout(p)(torch.ones(2_000_000))
    kept = (65536 - round(p * 65536)) / 65536
    assert (y != 0).double().mean().item() == pytest.approx(kept, abs=2e-5)
    assert set(y.unique().tolist()) <= {0.0, torch.tensor(1 / kept).item() if kept else 0.0}
