"""The engine's module on arrays of a CUDA device that is virtual: see cuda/tests/virtual."""

from __future__ import annotations

import pytest

from replaced_module import output_with


@pytest.mark.virtual_device
@pytest.mark.parametrize("route", ["steps", "persistent"])
def test_arrays_on_a_device_agree_with_the_reference(route: str) -> None:
    assert output_with("virtual_device", route, FASTRNN_CUBLASLT="none") == "30 problems agree"
