"""A new cell costs one header, its place in the list of cells and one NumPy function pair."""

from __future__ import annotations

import pytest

from replaced_module import output_with


@pytest.mark.parametrize("isa", ["portable", ""], ids=["portable", "widest"])
def test_a_cell_is_one_header_and_one_reference_function(isa: str) -> None:
    """The module has a set with few registers and one with many, whose blocks differ."""
    assert output_with("toy_cell", FASTRNN_ISA=isa) == "45 problems agree"
