"""Tables on a terminal."""

from lmkern.cli.show import columns, results


def test_columns_are_aligned_without_trailing_space() -> None:
    assert columns([("a", "b", ""), ("longer", "c", "d")]) == "a       b\nlonger  c  d"


def test_results_show_weight_and_what_has_no_perplexity() -> None:
    rows = [
        {"name": "lmkern GPT", "bits_per_byte": 2.0, "perplexity": 1234.5},
        {"name": "interpolation", "weight": 0.25, "bits_per_byte": 1.5, "perplexity": 10.0},
        {"name": "xz -9e", "bits_per_byte": 1.97},
    ]
    lines = results({"rows": rows}).splitlines()
    assert lines[0].split("  ")[0] == "model"
    assert [line.split()[-2:] for line in lines[1:]] == [
        ["2.000", "1,234.5"],
        ["1.500", "10.0"],
        ["1.970", "-"],
    ]
    assert "interpolation (weight of the GPT 0.25)" in lines[2]
