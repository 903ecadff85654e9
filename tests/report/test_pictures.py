"""The curves are drawn from the events, the same each time, for any run."""

import xml.etree.ElementTree as ET

import numpy as np
import pytest

from lmkern.report.pictures import DARK, MAX_POINTS, Boundary, curves, smooth, stage_boundaries, thin


def steps(count: int) -> list[dict]:
    return [
        {
            "event": "step",
            "step": i,
            "tokens": 512 * i,
            "stage": int(i > 3),
            "loss": 5 - i / count,
            "learning_rate": 1e-3,
            "tokens_per_second": 1e4,
        }
        for i in range(1, count + 1)
    ]


def test_same_events_give_the_same_picture() -> None:
    boundaries = [Boundary(0, "sentences, 32"), Boundary(1536, "documents, 64")]
    first, second = (curves(steps(20), [{"tokens": 10240, "loss": 4.5}], boundaries) for _ in range(2))
    assert first == second
    assert "sentences, 32" in first
    assert "documents, 64" in first
    assert "best 4.500" in first


def test_picture_is_xml_with_a_dark_counterpart_of_each_colour() -> None:
    svg = curves(steps(20), [], [])
    ET.fromstring(svg)
    assert all(f": {dark};" in svg for dark in DARK.values())
    assert all(
        f"var(--c{index}, {light})" in svg for index, light in enumerate(DARK) if "c2571a" not in light
    )


@pytest.mark.parametrize("count", [1, 2, 3 * MAX_POINTS])
def test_any_number_of_steps_can_be_drawn(count: int) -> None:
    ET.fromstring(curves(steps(count), [], []))


def test_run_without_one_finite_loss_can_be_drawn() -> None:
    events = [{**event, "loss": None} for event in steps(5)]
    ET.fromstring(curves(events, [{"tokens": 1024, "loss": None}], []))


def test_smoothing_skips_what_is_not_finite() -> None:
    values = np.full(200, 3.0)
    values[[0, 50]] = np.nan
    np.testing.assert_allclose(smooth(values), 3.0)
    assert np.isnan(smooth(np.array([np.nan, 1.0]))[0])


def test_smoothing_does_not_lag() -> None:
    ramp = np.arange(200.0)
    np.testing.assert_allclose(smooth(ramp)[2:-2], ramp[2:-2])
    assert np.ptp(smooth(np.tile([0.0, 1.0], 500))) < 0.1


def test_thinning_keeps_both_ends() -> None:
    x, y = thin(np.arange(5000), np.arange(5000) * 2)
    assert (len(x), x[0], x[-1], y[-1]) == (MAX_POINTS, 0, 4999, 9998)


def test_boundaries_stand_where_the_stage_changes() -> None:
    names = ["sentences, 32", "documents, 64"]
    assert stage_boundaries(steps(5), names) == [Boundary(0, names[0]), Boundary(3 * 512, names[1])]
    assert stage_boundaries(steps(3), names) == []
    assert stage_boundaries([], names) == []
