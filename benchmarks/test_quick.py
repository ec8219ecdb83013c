"""The quick suite with pytest-benchmark: `pytest benchmarks`, one row per case and provider."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from fastrnn.bench.cases import PASSES, Case, Pass, load_suites
from fastrnn.bench.data import make_data
from fastrnn.bench.prepare import MissingPeerError, UnsupportedError
from fastrnn.bench.providers import make_provider

if TYPE_CHECKING:
    from pytest_benchmark.fixture import BenchmarkFixture


@pytest.mark.parametrize("provider", ["fastrnn", "torch", "onnxruntime"])
@pytest.mark.parametrize("pass_", PASSES)
@pytest.mark.parametrize("case", load_suites()["quick"], ids=Case.label)
def test_quick(benchmark: BenchmarkFixture, case: Case, pass_: Pass, provider: str) -> None:
    try:
        prepared = make_provider(provider).prepare(case, make_data(case, "cpu"), pass_)
    except (MissingPeerError, UnsupportedError) as reason:
        pytest.skip(str(reason))
    benchmark.group = f"{case.label()} {pass_}"
    benchmark.extra_info["kernel"] = prepared.kernel
    with prepared.context():
        benchmark(prepared.run, 0)
