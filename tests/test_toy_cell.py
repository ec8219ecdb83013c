"""A new cell costs one header, its place in the list of cells and one NumPy function pair."""

from __future__ import annotations

from replaced_module import output_with


def test_a_cell_is_one_header_and_one_reference_function() -> None:
    assert output_with("toy_cell") == "45 problems agree"
