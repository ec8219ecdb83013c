"""The certificate of a CUDA device: kept whole, believed only where everything is as it was."""

from __future__ import annotations

import json
import warnings
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from fastrnn import _C, _certificate, _engine
from fastrnn._engine import CUDA_SWITCH, CudaRoute, cuda_route
from fastrnn._options import Options

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

NAME = "NVIDIA H200"
TRUSTED = {
    "cell": "LSTM", "dtype": "float16", "layers": 1, "bidirectional": False, "pass": "training",
    "kernels": "persistent", "hidden": [128, 512], "rows": [1, 16], "trusted": True, "steps": 1,
    "ratio": 1.5, "why": "",
}  # fmt: skip


@pytest.fixture(autouse=True)
def device(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """A machine with one GPU, and no certificate of it yet."""
    known = {"driver": "13.0", "devices": [{"name": NAME, "capability": (9, 0)}], "error": None}
    monkeypatch.setattr(_C, "cuda_info", lambda: known)
    monkeypatch.setattr(_engine, "built_with_cuda", lambda: True)
    monkeypatch.setattr(_certificate, "DRIVER", tmp_path / "driver")
    monkeypatch.setenv(_certificate.FOLDER_VARIABLE, str(tmp_path / "certificates"))
    monkeypatch.delenv(CUDA_SWITCH, raising=False)
    _certificate.of_device.cache_clear()
    yield
    _certificate.of_device.cache_clear()


def document(*classes: dict[str, Any], **key: Any) -> dict[str, Any]:
    here = _certificate.key_of(0)._asdict()
    return {"format": _certificate.FORMAT, "key": {**here, **key}, "classes": list(classes)}


def route(
    options: Options = Options("LSTM"),  # noqa: B008
    dtype: str = "float16",
    rows: int = 8,
    hidden_size: int = 256,
    training: bool = True,
    **more: Any,
) -> CudaRoute:
    return cuda_route(options, dtype, rows, hidden_size, training, 0, **more)


def test_without_a_certificate_no_kernels_run() -> None:
    found = route()
    assert not found.kernels
    assert found.reason == "no certificate of this device; `fastrnn certify` makes one"


def test_a_class_of_the_certificate_runs_by_its_kernels() -> None:
    _certificate.write(document(TRUSTED))
    found = route()
    assert (found.kernels, found.persistent) == (True, True)
    assert found.reason == "certified on this device, 1.50 times as fast as torch's"


def test_of_two_kinds_of_kernels_the_faster_runs() -> None:
    steps = {**TRUSTED, "kernels": "steps", "ratio": 1.6}
    _certificate.write(document(TRUSTED, steps))
    assert route() == (True, "certified on this device, 1.60 times as fast as torch's", False)


@pytest.mark.parametrize(
    "call",
    [
        {"rows": 17},
        {"rows": 0},
        {"hidden_size": 127},
        {"hidden_size": 513},
        {"dtype": "float32"},
        {"training": False},
        {"options": Options("GRU")},
        {"options": Options("LSTM", bidirectional=True)},
        {"options": Options("LSTM", 2)},
        {"options": Options("LSTM", heads=2)},
        {"options": Options("LSTM", proj_size=8)},
        {"options": Options("LSTM", bias=False)},
        {"options": Options("LSTM", activation="relu")},
        {"options": Options("LSTM", gate_activation="hardsigmoid")},
        {"options": Options("LSTM", layer_norm=True)},
        {"options": Options("LSTM", recompute=True)},
    ],
    ids=str,
)
def test_what_was_not_run_is_not_trusted(call: dict[str, Any]) -> None:
    _certificate.write(document(TRUSTED))
    assert route(**call) == (False, "the certificate of this device does not cover the case", False)


def test_a_reset_before_the_product_is_not_trusted() -> None:
    _certificate.write(document({**TRUSTED, "cell": "GRU"}))
    assert route(Options("GRU")).kernels
    assert not route(Options("GRU", reset_after=False)).kernels


@pytest.mark.parametrize("layers", [1, 2, 5])
def test_two_directions_are_trusted_in_any_number_of_layers(layers: int) -> None:
    _certificate.write(document({**TRUSTED, "layers": 2, "bidirectional": True}))
    assert route(Options("LSTM", layers, bidirectional=True)).kernels
    assert not route(Options("LSTM", layers)).kernels


@pytest.mark.parametrize(("steps", "kernels"), [(None, False), (19, False), (20, True)])
def test_a_class_is_trusted_from_its_number_of_steps_on(steps: int | None, kernels: bool) -> None:
    _certificate.write(document({**TRUSTED, "steps": 20}))
    assert route(steps=steps).kernels is kernels


def test_a_class_that_is_refused_is_not_trusted() -> None:
    _certificate.write(document({**TRUSTED, "trusted": False, "why": "hung"}))
    assert not route().kernels


OTHERS = {
    "device": "NVIDIA H100",
    "driver": "12.8",
    "cuda": "11.8",
    "torch": "2.0.0",
    "fastrnn": "0.0.1",
    "kernels": "0" * 64,
}


@pytest.mark.parametrize(("name", "value"), OTHERS.items())
def test_a_certificate_made_for_something_else_is_ignored_with_one_warning(
    name: str, value: str
) -> None:
    path = _certificate.write(document(TRUSTED))
    path.write_text(json.dumps(document(TRUSTED, **{name: value})))
    with pytest.warns(UserWarning, match=f"made for {name} {value}, but this") as seen:
        assert not route().kernels
    assert str(path) in str(seen[0].message)
    assert "`fastrnn certify` writes a new one" in str(seen[0].message)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not route().kernels


def without(name: str) -> str:
    return json.dumps({k: v for k, v in document(TRUSTED).items() if k != name})


def with_class(**fields: Any) -> str:
    return json.dumps(document({**TRUSTED, **fields}))


DAMAGED = {
    "empty": lambda: "",
    "truncated": lambda: json.dumps(document(TRUSTED))[:200],
    "a list": lambda: "[]",
    "a number": lambda: "1",
    "another format": lambda: json.dumps({**document(TRUSTED), "format": 2}),
    "no key": lambda: without("key"),
    "half a key": lambda: json.dumps({**document(TRUSTED), "key": {"device": NAME}}),
    "no classes": lambda: without("classes"),
    "classes of another kind": lambda: json.dumps({**document(), "classes": 3}),
    "a class of another kind": lambda: json.dumps({**document(), "classes": ["LSTM"]}),
    "half a range": lambda: with_class(hidden=[128]),
    "a range of words": lambda: with_class(rows=["few", "many"]),
    "other kernels": lambda: with_class(kernels="magic"),
    "another pass": lambda: with_class(**{"pass": "sideways"}),
    "no ratio": lambda: with_class(ratio=None),
    "a list for a cell": lambda: with_class(cell=["LSTM"]),
    "a word for a bool": lambda: with_class(bidirectional="no"),
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_a_damaged_certificate_is_ignored_with_one_warning(damage: str) -> None:
    path = _certificate.write(document())
    path.write_text(DAMAGED[damage]())
    with pytest.warns(UserWarning, match="it is damaged or has another format") as seen:
        assert not route().kernels
    assert len(seen) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not route().kernels


def test_a_certificate_that_is_no_text_is_ignored() -> None:
    path = _certificate.write(document())
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.warns(UserWarning, match="it cannot be read"):
        assert not route().kernels


def test_the_route_reads_a_certificate_once(monkeypatch: pytest.MonkeyPatch) -> None:
    _certificate.write(document(TRUSTED))
    reads = []
    read = _certificate.read

    def count(device: int) -> _certificate.Certificate:
        reads.append(device)
        return read(device)

    monkeypatch.setattr(_certificate, "read", count)
    assert all(route().kernels for _ in range(5))
    assert reads == [0]


def test_a_certificate_of_another_kind_of_device_is_not_of_this_one() -> None:
    other = _certificate.Key(**document(device="NVIDIA A100", capability="8.0")["key"])
    assert _certificate.path_of(other) != _certificate.path_of(_certificate.key_of(0))
    _certificate.write(document(TRUSTED, device="NVIDIA A100", capability="8.0"))
    assert route().reason == _certificate.NONE


def test_nothing_is_asked_of_cuda_where_there_is_no_certificate(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(_C, "cuda_info", lambda: pytest.fail("asked"))
    assert route().reason == _certificate.NONE


def test_the_driver_is_known_by_its_own_version_where_linux_tells_it(tmp_path: Path) -> None:
    assert _certificate.key_of(0).driver == "13.0"
    kernel_module = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release"
    (tmp_path / "driver").write_text(f"{kernel_module}\nGCC version:  gcc version 11.4.0\n")
    assert _certificate.key_of(0).driver == "580.65.06"


def test_a_certificate_is_written_whole_or_not_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    path = _certificate.write(document(TRUSTED))
    before = path.read_text()

    def full(*_: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr("pathlib.Path.replace", full)
    with pytest.raises(OSError, match="no space left"):
        _certificate.write(document())
    assert path.read_text() == before
    assert list(path.parent.iterdir()) == [path]


def test_certificates_are_in_the_users_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    import platformdirs

    monkeypatch.delenv(_certificate.FOLDER_VARIABLE)
    cache = platformdirs.user_cache_path("fastrnn", appauthor=False)
    assert _certificate.folder() == cache / "certificates"


SWITCH = {
    "0": (False, "FASTRNN_CUDA_KERNELS is 0", False),
    "1": (True, "FASTRNN_CUDA_KERNELS is 1", False),
    "persistent": (True, "FASTRNN_CUDA_KERNELS is persistent", True),
    "auto": (True, "certified on this device, 1.50 times as fast as torch's", True),
    "": (True, "certified on this device, 1.50 times as fast as torch's", True),
}


@pytest.mark.parametrize("value", SWITCH)
def test_the_environment_has_the_last_word(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _certificate.write(document(TRUSTED))
    monkeypatch.setenv(CUDA_SWITCH, value)
    assert route() == SWITCH[value]


def test_the_environment_is_read_at_every_call(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not route().kernels
    monkeypatch.setenv(CUDA_SWITCH, "1")
    assert route().kernels


def test_another_word_in_the_environment_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CUDA_SWITCH, "fast")
    with pytest.raises(ValueError, match="expected auto, 0, 1 or persistent, got 'fast'"):
        route()


def test_a_build_without_kernels_has_none_to_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_engine, "built_with_cuda", lambda: False)
    monkeypatch.setenv(CUDA_SWITCH, "1")
    assert route() == (False, "this build has no CUDA kernels", False)


def test_a_relu_network_is_certified_with_the_tanh_one() -> None:
    _certificate.write(document({**TRUSTED, "cell": "RNN"}))
    options = Options("RNN")
    assert route(options).kernels
    assert route(replace(options, activation="relu")).kernels
    assert not route(replace(options, activation="sigmoid")).kernels
