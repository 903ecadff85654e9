"""Tables on a terminal."""

from lmkern.cli.show import columns


def test_columns_are_aligned_without_trailing_space() -> None:
    assert columns([("a", "b", ""), ("longer", "c", "d")]) == "a       b\nlonger  c  d"
