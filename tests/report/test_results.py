"""The rows of an evaluation in words."""

from lmkern.report.results import result_table


def test_table_shows_the_weight_and_what_has_no_perplexity() -> None:
    rows = [
        {"name": "lmkern GPT", "bits_per_byte": 2.0, "perplexity": 1234.5},
        {"name": "interpolation", "weight": 0.25, "bits_per_byte": 1.5, "perplexity": 10.0},
        {"name": "xz -9e", "bits_per_byte": 1.97},
    ]
    assert result_table({"rows": rows}) == [
        ("model", "bits per byte", "perplexity per token"),
        ("lmkern GPT", "2.000", "1,234.5"),
        ("interpolation (weight of the GPT 0.25)", "1.500", "10.0"),
        ("xz -9e", "1.970", "-"),
    ]
