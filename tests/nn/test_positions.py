import math
from functools import partial

import pytest
import torch

from lmkern.nn import LearnedPositions, Rotary, SinusoidalPositions, sinusoidal_positions


@pytest.mark.parametrize("width", [1, 6, 7])
def test_sinusoidal_table_is_the_papers(width):
    table = sinusoidal_positions(9, width, offset=1000)
    assert table.shape == (9, width)
    assert table.dtype == torch.float32
    for row in (0, 8):
        for column in range(width):
            angle = (1000 + row) / 10000 ** (2 * (column // 2) / width)
            expected = math.cos(angle) if column % 2 else math.sin(angle)
            assert table[row, column].item() == pytest.approx(expected, abs=1e-6)


def test_every_position_has_its_own_sines():
    table = sinusoidal_positions(500, 16)
    distances = torch.cdist(table, table) + torch.eye(500)
    assert distances.min() > 1e-3


def test_sinusoidal_positions_continue_at_the_offset():
    positions = SinusoidalPositions(6)
    torch.testing.assert_close(positions(10)[4:], positions(6, offset=4), rtol=0, atol=0)


@pytest.mark.parametrize(("length", "width"), [(-1, 4), (3, 0)])
def test_sinusoidal_sizes_are_checked(length, width):
    with pytest.raises(ValueError, match=f"sinusoidal_positions: .* got {length}, {width}"):
        sinusoidal_positions(length, width)


def test_learned_positions_are_rows_and_end_with_the_context():
    positions = LearnedPositions(8, 3)
    torch.testing.assert_close(positions(2, offset=6), positions.weight[6:8], rtol=0, atol=0)
    with pytest.raises(
        ValueError, match="LearnedPositions: there are vectors for 8 positions; got 3 from 6 on"
    ):
        positions(3, offset=6)


def _rotation_by_complex_numbers(x, offset, base):
    """(x1 + i x2) exp(i angle), float64: a second way to the same thing."""
    head_dim = x.shape[-1]
    i = torch.arange(head_dim // 2, dtype=torch.float64)
    p = torch.arange(offset, offset + x.shape[1], dtype=torch.float64)
    turns = torch.polar(
        torch.ones(len(p), len(i), dtype=torch.float64), torch.outer(p, base ** (-2 * i / head_dim))
    )
    x1, x2 = x.double().chunk(2, dim=-1)
    y = torch.complex(x1, x2) * turns[:, None]
    return torch.cat((y.real, y.imag), dim=-1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("offset", [0, 11])
def test_rotary_rotates_half_against_half(dtype, offset):
    torch.manual_seed(0)
    x = torch.randn(2, 5, 3, 8).to(dtype)
    y = Rotary(8, 16, base=500.0)(x, offset=offset)
    assert y.dtype == dtype
    tolerance = 2**-8 if dtype == torch.bfloat16 else 1e-6
    expected = _rotation_by_complex_numbers(x, offset, 500.0)
    torch.testing.assert_close(y.double(), expected, rtol=tolerance, atol=tolerance)


def test_rotary_products_depend_on_the_distance_alone():
    torch.manual_seed(0)
    rotary = Rotary(16, 64)
    q, k = torch.randn(1, 1, 1, 16), torch.randn(1, 1, 1, 16)

    def product(i, j):
        return (rotary(q, offset=i) * rotary(k, offset=j)).sum().item()

    assert product(3, 1) == pytest.approx(product(63, 61), abs=1e-5)
    assert product(40, 0) == pytest.approx(product(50, 10), abs=1e-5)
    assert abs(product(3, 1) - product(1, 3)) > 1e-2
    assert abs(product(3, 1) - product(4, 1)) > 1e-2


def test_rotary_keeps_lengths_so_its_backward_does_too():
    x = torch.randn(1, 7, 2, 6, requires_grad=True)
    y = Rotary(6, 7)(x)
    torch.testing.assert_close(y.norm(dim=-1), x.norm(dim=-1))
    dy = torch.randn_like(y)
    (dx,) = torch.autograd.grad(y, x, dy)
    torch.testing.assert_close(dx.norm(dim=-1), dy.norm(dim=-1))


def test_rotary_tables_stay_float32_and_filled():
    expected = Rotary(8, 16)
    for rotary in (Rotary(8, 16).bfloat16(), Rotary(8, 16).to("meta").to_empty(device="cpu")):
        assert rotary.cos.dtype == torch.float32
        torch.testing.assert_close((rotary.cos, rotary.sin), (expected.cos, expected.sin), rtol=0, atol=0)
        assert not rotary.state_dict()


@pytest.mark.parametrize(
    "trace", [lambda module: module, partial(torch.compile, backend="eager", fullgraph=True)]
)
def test_rotary_of_a_model_from_meta_builds_its_tables_where_it_is_asked(trace):
    x, rotary = torch.randn(2, 5, 3, 8, requires_grad=True), Rotary(8, 16).to("meta")
    with torch.inference_mode():
        trace(rotary)(x)
    y = rotary(x)
    torch.testing.assert_close(y, Rotary(8, 16)(x), rtol=0, atol=0)
    y.sum().backward()


def test_rotary_checks_sizes():
    with pytest.raises(ValueError, match="Rotary: head_dim must be even and at least 2; got 7"):
        Rotary(7, 16)
    with pytest.raises(
        ValueError, match=r"Rotary: .*positions below 16; got \(1, 4, 1, 8\).* from position 13"
    ):
        Rotary(8, 16)(torch.zeros(1, 4, 1, 8), offset=13)
    with pytest.raises(ValueError, match="Rotary: expected head_dim 8"):
        Rotary(8, 16)(torch.zeros(1, 4, 1, 4))
