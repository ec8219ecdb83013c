"""A torch older than the oldest supported one is refused, and the error says what to do."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from fastrnn import _torch_version
from programs import run_program

ROOT = Path(__file__).parent.parent
OLDEST = ".".join(map(str, _torch_version.OLDEST))


@pytest.mark.parametrize("version", ["2.9.1+cu128", "2.9.0", "2.4.1", "1.13.1"])
def test_an_older_torch_is_refused(version: str) -> None:
    with pytest.raises(ImportError) as caught:
        _torch_version.check(version)
    message = str(caught.value)
    assert f"needs torch {OLDEST} or newer" in message
    assert f"found torch {version}." in message
    assert f"pip install --upgrade 'torch>={OLDEST}'" in message


@pytest.mark.parametrize(
    "version",
    ["2.10.0", "2.10.0a0+b558c986e8.nv25.11", "2.14.1+cu130", "2.16.0.dev20261130+cpu", "3.0.0"],
)
def test_a_torch_that_is_new_enough_is_taken(version: str) -> None:
    _torch_version.check(version)


def test_the_names_that_need_torch_refuse_an_older_one_and_the_others_work() -> None:
    pytest.importorskip("torch", reason="torch is not installed")
    code = """
        import numpy as np
        import torch
        torch.__version__ = "2.9.1"
        import fastrnn
        names = ["LSTM", "GRUCell", "convert", "to_torch", "from_keras", "gradient_flow", "freeze"]
        names += ["unfreeze", "patch_torch", "unpatch_torch", "decompositions"]
        for name in names:
            try:
                found = getattr(fastrnn, name)
                if name == "decompositions":  # its module imports torch when it is called
                    found()
            except ImportError as error:
                assert "found torch 2.9.1" in str(error), error
            else:
                raise AssertionError(name)
        try:
            fastrnn.functional.rnn(torch.ones(3, 2, 4), None, [torch.ones(4, 4)] * 2, bias=False)
        except ImportError as error:
            assert "found torch 2.9.1" in str(error), error
        else:
            raise AssertionError("a torch tensor")
        weights = [np.ones((4, 4))] * 2
        output, _ = fastrnn.functional.rnn(np.ones((3, 2, 4)), None, weights, bias=False)
        assert output.shape == (3, 2, 4)
        assert fastrnn.info()["torch"]["version"] == "2.9.1"
    """
    run_program(code)


def test_the_extra_asks_for_the_oldest_torch() -> None:
    project = (ROOT / "pyproject.toml").read_text("utf-8")
    assert re.search(r'^torch = \["torch>=(.*)"\]$', project, re.MULTILINE)[1] == OLDEST  # type: ignore[index]
