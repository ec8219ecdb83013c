"""The benchmark: peers run and are checked, records are what the API says, two runs compare."""

from __future__ import annotations

import importlib
import json
import statistics
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import fastrnn
from fastrnn import _C, cli
from fastrnn.bench import (
    cases,
    cells,
    compare,
    records,
    report,
    roof,
    runner,
    step_providers,
    timing,
)
from fastrnn.bench.cases import Case
from fastrnn.bench.data import Data, make_data
from fastrnn.bench.inference_providers import Frozen, Streamed, TorchCompiled
from fastrnn.bench.precision import precision
from fastrnn.bench.prepare import Prepared, UnsupportedError
from fastrnn.bench.providers import Fastrnn, Torch

TINY = [Case("LSTM", 3, 2, 5, 4), Case("GRU", 3, 2, 5, 4), Case("RNN", 3, 2, 5, 4)]
STACK = Case("LSTM", 3, 2, 5, 4, layers=2, bidirectional=True)


def request(*chosen: Case, **options: Any) -> runner.Request:
    return runner.Request([("tiny", case) for case in chosen], seconds=0.01, threads=1, **options)


@pytest.fixture(autouse=True)
def _a_quick_roof(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rough rates do here; test_roof.py has how they are measured."""
    monkeypatch.setattr(roof, "READ_SAMPLES", 1)
    monkeypatch.setattr(roof, "READ_SECONDS", 5e-4)
    monkeypatch.setattr(roof, "MEMORY_BYTES", 1 << 23)


@pytest.fixture
def tiny_suite(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cases, "load_suites", lambda: {"quick": TINY})


def test_every_case_runs_against_both_peers() -> None:
    pytest.importorskip("onnxruntime")
    results = runner.run(request(*TINY, peers=("torch", "onnxruntime")))
    found = {(r["case"]["cell"], r["pass"], r["provider"]) for r in results.records}
    expected = {(c.cell, p, n) for c in TINY for p in cases.PASSES for n in ("fastrnn", "torch")}
    expected |= {(c.cell, "inference", n) for c in TINY for n in ("frozen", "onnxruntime")}
    assert found == expected
    reasons = {(e["provider"], e["pass"]): e["reason"] for e in results.not_run}
    assert reasons == {("onnxruntime", "training"): "ONNX Runtime supports only inference"}


@pytest.mark.parametrize("cell", cases.CELLS)
def test_stacks_in_both_directions_agree_with_both_peers(cell: str) -> None:
    pytest.importorskip("onnxruntime")
    case = replace(STACK, cell=cell)
    results = runner.run(request(case, passes=("inference",), peers=("torch", "onnxruntime")))
    providers = [r["provider"] for r in results.records]
    assert providers == ["fastrnn", "frozen", "torch", "onnxruntime"]


def test_onnx_runtime_reads_a_relu_rnn() -> None:
    pytest.importorskip("onnxruntime")
    case = Case("RNN", 3, 2, 5, 4, nonlinearity="relu")
    results = runner.run(request(case, passes=("inference",), peers=("onnxruntime",)))
    assert len(results.records) == 3


@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
def test_other_dtypes_run_where_the_peer_has_them(dtype: str) -> None:
    results = runner.run(request(replace(TINY[0], dtype=dtype), peers=("torch",)))
    assert {r["case"]["dtype"] for r in results.records} == {dtype}
    assert len(results.records) == 5


def test_the_kernel_names_the_route_that_ran() -> None:
    results = runner.run(request(TINY[0], peers=("torch",)))
    kernels = {r["kernel"] for r in results.records if r["provider"] == "fastrnn"}
    assert len(kernels) == 1
    assert kernels.pop().startswith("engine ")


class WrongByOneWeight(Torch):
    """A peer whose result is not ours: one of its weights differs."""

    def prepare(self, case: Case, data: Data, pass_: cases.Pass) -> Prepared:
        weights = [data.weights[0] + 0.1, *data.weights[1:]]
        return super().prepare(case, replace(data, weights=weights), pass_)


@pytest.mark.parametrize("pass_", cases.PASSES)
def test_a_wrong_result_is_caught_before_it_is_timed(
    pass_: cases.Pass, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner, "make_provider", lambda name: WrongByOneWeight())
    with pytest.raises(runner.MismatchError, match=rf"LSTM T3 .*, {pass_}: \w+ of torch differs"):
        runner.run(request(TINY[0], passes=(pass_,), peers=("torch",)))


def test_a_result_of_nan_is_wrong() -> None:
    case, data = TINY[0], make_data(TINY[0], "cpu")
    ours = Fastrnn().prepare(case, data, "inference")
    theirs = replace(ours, results=lambda: {n: x * torch.nan for n, x in ours.results().items()})
    with pytest.raises(runner.MismatchError):
        runner.check(case, data, "inference", {"fastrnn": ours, "torch": theirs})


def test_training_compares_outputs_and_every_gradient() -> None:
    """Those of the output alone, as they are timed, and with the final states'."""
    prepared = Fastrnn().prepare(STACK, make_data(STACK, "cpu"), "training")
    weights = dict(torch.nn.LSTM(5, 4, num_layers=2, bidirectional=True).named_parameters())
    gradients = {"d_input", "d_h0", "d_c0"} | {f"d_{n}" for n in weights}
    results = prepared.results()
    assert set(results) == {"output", "h_n", "c_n", *gradients} | {
        f"{name} with d_h_n" for name in gradients
    }
    assert len(prepared.run(0)) == len(gradients)
    for name in gradients:
        assert not torch.equal(results[name], results[f"{name} with d_h_n"])


def test_what_no_peer_does_is_listed_with_the_reason() -> None:
    case = replace(TINY[0], heads=2, lengths=True)
    results = runner.run(request(case, passes=("inference",), peers=("torch",)))
    assert [r["provider"] for r in results.records] == ["fastrnn"]
    reasons = [(e["provider"], e["reason"]) for e in results.not_run]
    assert reasons == [("torch", "torch.nn has no heads and no lengths")]


def test_fastrnns_three_ways_to_infer_are_rows_of_their_own() -> None:
    """A stream is for single steps; the peers of all three are the others."""
    step = Case("GRU", 1, 3, 5, 4, layers=2)
    results = runner.run(request(step, peers=("torch",)))
    providers = {r["pass"]: [] for r in results.records}
    for record in results.records:
        providers[record["pass"]].append(record["provider"])
    assert providers["inference"] == ["fastrnn", "frozen", "stream", "torch"]
    assert providers["training"] == ["fastrnn", "torch"]
    by_name = {r["provider"]: r for r in results.records if r["pass"] == "inference"}
    for record in by_name.values():
        best = by_name["torch"]["median_ms"] / record["median_ms"]
        assert record["ratio_to_best_peer"] == pytest.approx(best)
    assert {r["kernel"] for r in by_name.values()} >= {
        f"engine {_C.isa()}{way}" for way in ("", ", frozen", ", stream")
    }
    assert results.not_run == []


@pytest.mark.parametrize("way", [Frozen, Streamed])
@pytest.mark.parametrize("cell", cases.CELLS)
def test_a_frozen_layer_and_a_stream_give_the_layers_bits(cell: str, way: Any) -> None:
    case = Case(cell, 1, 3, 5, 4, layers=2)
    data = make_data(case, "cpu")
    ours = Fastrnn().prepare(case, data, "inference").results()
    prepared = way().prepare(case, data, "inference")
    prepared.run(0)  # the states of a stream go on; its results begin from the case's
    theirs = prepared.results()
    assert set(theirs) == set(ours)
    for name, array in ours.items():
        assert torch.equal(theirs[name], array), name


@pytest.mark.parametrize(
    ("way", "case", "reason"),
    [
        (Streamed, TINY[0], "single steps"),
        (Streamed, Case("GRU", 1, 2, 5, 4, bidirectional=True), "in one direction"),
        (Frozen, Case("MGU", 3, 2, 6, 8), "no frozen layer"),
        (Frozen, replace(TINY[0], layer_norm=True), "not compared with layer norm"),
        (TorchCompiled, replace(TINY[0], lengths=True), "torch.nn has no lengths"),
    ],
)
def test_a_way_that_does_not_fit_the_case_says_why(way: Any, case: Case, reason: str) -> None:
    with pytest.raises(UnsupportedError, match=reason):
        way().prepare(case, make_data(case, "cpu"), "inference")


def test_torchs_compiled_layer_is_checked_as_every_peer(monkeypatch: pytest.MonkeyPatch) -> None:
    def eagerly(layer: torch.nn.Module) -> Any:
        return torch._dynamo.optimize("eager")(layer)

    monkeypatch.setattr(step_providers, "compile_elsewhere", lambda *_: None)
    monkeypatch.setattr(torch, "compile", eagerly)
    results = runner.run(request(TINY[0], peers=("torch_compile",)))
    providers = [r["provider"] for r in results.records]
    assert providers == ["fastrnn", "frozen", "torch_compile", "fastrnn", "torch_compile"]
    assert results.records[2]["kernel"] == "torch.compile, inductor"


def test_a_layer_that_does_not_compile_in_time_is_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_providers, "COMPILE_SECONDS", 0.01)
    results = runner.run(request(TINY[0], passes=("inference",), peers=("torch_compile",)))
    (entry,) = results.not_run
    assert entry["reason"] == "did not compile within 0.01 s"


@pytest.mark.parametrize("cell", cases.CELLS)
@pytest.mark.parametrize(
    ("option", "way"),
    [
        ({"reset_rate": 0.3}, "a step at a time"),
        ({"lengths": True}, "packed"),
        ({"heads": 2}, "a head at a time"),
        ({"layer_norm": True}, "operations"),
        ({"members": 3}, "a member at a time"),
    ],
)
def test_options_run_against_torchs_own_way(cell: str, option: dict[str, Any], way: str) -> None:
    """Both agree, outputs and every gradient, or the run would stop."""
    case = Case(cell, 6, 2, 5, 4, **option)
    results = runner.run(request(case, peers=("torch", "onnxruntime")))
    frozen = ["frozen"] if set(case.options) <= {"resets", "lengths"} else []
    providers = [r["provider"] for r in results.records]
    assert providers == ["fastrnn", *frozen, "torch", "fastrnn", "torch"]
    kernels = {r["kernel"] for r in results.records if r["provider"] == "torch"}
    assert all(kernel.endswith(f", {way}") for kernel in kernels)
    assert all(r["kernel"].startswith("engine") for r in report.ours(results.records))
    assert {e["provider"] for e in results.not_run} == {"onnxruntime"}
    assert Case(**case.as_record()) == case


def step(cell: str) -> Case:
    """A small case of a cell that is a torch module; skips where its package is not installed."""
    if cell in ("IndRNN", "LEM", "NAS"):
        pytest.importorskip("torchrecurrent")
    return Case(cell, 3, 2, 6, 8)


@pytest.mark.parametrize("cell", cases.STEPS)
def test_a_step_runs_against_its_loop(cell: str) -> None:
    """Both agree, outputs and every gradient, or the run would stop."""
    results = runner.run(request(step(cell), peers=("loop",)))
    assert [r["provider"] for r in results.records] == ["fastrnn", "loop"] * 2
    assert {r["kernel"] for r in results.records[1::2]} == {step_providers.LOOP}


@pytest.mark.parametrize("cell", step_providers.LAYERS)
def test_a_step_that_is_written_out_runs_against_our_layer(cell: str) -> None:
    results = runner.run(request(step(cell), peers=("layer",)))
    assert [r["provider"] for r in results.records] == ["fastrnn", "layer"] * 2
    assert results.records[1]["kernel"] == f"fastrnn.{step_providers.LAYERS[cell]}"


@pytest.mark.parametrize("cell", cases.STEPS)
def test_the_products_of_a_step_are_those_that_torch_counts(cell: str) -> None:
    case = step(cell)
    data = make_data(case, "cpu")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        cells.Loop(step_providers.make_cell(case, data))(data.inputs[0])
    assert case.flops("inference") == counter.get_total_flops()


def test_a_step_and_a_layer_have_peers_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_providers, "compile_elsewhere", lambda *_: "was not tried")
    results = runner.run(request(step("MGU"), TINY[0], passes=("inference",)))
    peers = {(r["case"]["cell"], r["provider"]) for r in results.records}
    assert {("MGU", "fastrnn"), ("MGU", "loop"), ("LSTM", "torch")} <= peers
    assert not {("MGU", "torch"), ("LSTM", "loop")} & peers
    reasons = {e["provider"]: e["reason"] for e in results.not_run if e["case"]}
    assert reasons["compile"] == "inference was not tried"
    assert reasons["layer"] == "fastrnn has no layer for this cell"


@pytest.mark.parametrize(
    ("peer", "case", "reason"),
    [
        ("torch", Case("MGU", 3, 2, 6, 8), "torch.nn has no layer for this cell"),
        ("onnxruntime", Case("MGU", 3, 2, 6, 8), "ONNX Runtime has no operator for this cell"),
        ("loop", TINY[0], "only cases of the suite cells, whose cells are torch modules"),
    ],
)
def test_a_peer_of_the_other_kind_says_why_it_does_not_run(
    peer: str, case: Case, reason: str
) -> None:
    if peer == "onnxruntime":
        pytest.importorskip("onnxruntime")
    results = runner.run(request(case, passes=("inference",), peers=(peer,)))
    assert [e["reason"] for e in results.not_run] == [reason]


def test_the_kernel_of_a_step_names_a_loop_where_each_step_calls_the_cell(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(fastrnn, "Recurrent", cells.Loop)
    results = runner.run(request(step("MGU"), peers=()))
    assert [r["kernel"] for r in results.records] == [step_providers.LOOP] * 2


def test_the_kernel_of_a_step_names_the_engine_where_the_cell_is_read_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class ReadOnce(cells.Loop):
        def forward(self, input: torch.Tensor, state: Any = None) -> tuple[torch.Tensor, Any]:
            rows, steps = input.flatten(0, 1), input.shape[0]
            output = self.cell(rows, state).unflatten(0, (steps, -1))
            return output, output[-1:]

    monkeypatch.setattr(fastrnn, "Recurrent", ReadOnce)
    results = runner.run(request(step("MGU"), passes=("inference",), peers=()))
    assert [r["kernel"] for r in results.records] == [f"engine {_C.isa()}, a program"]


def test_a_step_has_no_options() -> None:
    case = replace(step("MGU"), layers=2, lengths=True)
    results = runner.run(request(case, passes=("inference",), peers=("loop",)))
    (entry,) = results.not_run
    assert entry["reason"] == (
        "a cell that is a torch module is measured only as MGU T3 B2 I6 H8, without options"
    )


def test_a_case_lacking_its_package_is_listed_with_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    results = runner.run(request(Case("LEM", 3, 2, 6, 8), passes=("inference",), peers=("loop",)))
    (entry,) = results.not_run
    assert entry["provider"] == "fastrnn"
    assert entry["reason"].endswith("to install it: pip install torchrecurrent")
    assert results.records == []


def test_what_does_not_compile_in_time_is_listed_and_not_tried_in_training(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(step_providers, "COMPILE_SECONDS", 0.01)
    results = runner.run(request(step("MGU"), peers=("compile",)))
    reasons = [e["reason"] for e in results.not_run]
    assert reasons == ["inference did not compile within 0.01 s"] * 2


def test_what_fails_to_compile_is_listed_with_torchs_complaint() -> None:
    broken = replace(step("MGU"), dtype="float99")
    reason = step_providers.compile_elsewhere(broken, "cpu", "inference")
    assert reason == "did not compile: AttributeError: module 'torch' has no attribute 'float99'"


def test_the_compiled_loop_is_checked_as_every_peer(monkeypatch: pytest.MonkeyPatch) -> None:
    def eagerly(loop: torch.nn.Module) -> Any:
        return torch._dynamo.optimize("eager")(loop)

    monkeypatch.setattr(step_providers, "compile_elsewhere", lambda *_: None)
    monkeypatch.setattr(torch, "compile", eagerly)
    results = runner.run(request(step("MGU"), peers=("compile",)))
    assert [r["provider"] for r in results.records] == ["fastrnn", "compile"] * 2
    assert {r["kernel"] for r in results.records[1::2]} == {"torch.compile, inductor"}


def test_a_cell_is_chosen_by_name_in_any_case(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cases, "load_suites", lambda: {"tiny": [step("MGU"), step("CfC")]})
    options = ["--suite", "tiny", "--seconds", "0.01", "--threads", "1", "--against", "loop"]
    assert cli.main(["bench", *options, "--pass", "inference", "--cell", "cfc"]) == 0
    printed = capsys.readouterr().out
    assert "CfC T3" in printed
    assert "MGU" not in printed


def test_tf32_is_a_precision_of_its_own() -> None:
    suites = {"tiny": TINY}
    (_, case), *_ = cases.select(suites, ["tiny"], ["LSTM"], ["tf32"])
    assert (case.dtype, case.tf32, case.precision) == ("float32", True, "tf32")
    assert case.label().endswith(" tf32")
    assert Case(**case.as_record()) == case
    assert "tf32" not in TINY[0].as_record()
    with pytest.raises(ValueError, match="only CUDA devices multiply in TF32"):
        runner.run(request(case))


@pytest.mark.parametrize("tf32", [False, True])
def test_precision_is_set_for_its_block_alone(tf32: bool) -> None:
    def settings() -> tuple[bool, bool, bool]:
        cudnn = torch.backends.cudnn
        return torch.backends.cuda.matmul.allow_tf32, cudnn.allow_tf32, cudnn.benchmark

    before = settings()
    with precision(tf32):
        assert settings() == (tf32, tf32, True)
    assert settings() == before


def test_a_run_that_keeps_going_lists_what_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "make_provider", lambda name: WrongByOneWeight())
    seen: list[int] = []
    results = runner.run(
        request(*TINY[:2], passes=("inference",), peers=("torch",), keep_going=True),
        after_case=lambda results: seen.append(len(results.not_run)),
    )
    assert seen == [1, 2]
    assert results.records == []
    assert all(e["reason"].startswith("failed: ") for e in results.not_run)


@pytest.mark.usefixtures("tiny_suite")
def test_a_run_that_keeps_going_writes_after_each_case(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "new.json"
    sizes: list[int] = []
    save = records.save

    def counted(document: dict[str, Any], to: Path) -> None:
        sizes.append(len(document["records"]))
        save(document, to)

    monkeypatch.setattr(records, "save", counted)
    options = ["--seconds", "0.01", "--against", "torch", "--pass", "inference", "--keep-going"]
    assert cli.main(["bench", *options, "--json", str(path)]) == 0
    assert sizes == [3, 6, 9, 9]
    assert len(records.load(path)["records"]) == 9


def test_the_thread_count_holds_for_the_run_alone() -> None:
    before = torch.get_num_threads()
    results = runner.run(replace(request(TINY[0], peers=()), threads=2))
    assert results.threads == 2
    assert torch.get_num_threads() == before


def test_ctrl_c_keeps_what_was_measured() -> None:
    seen: list[str] = []

    def on_case(label: str) -> None:
        seen.append(label)
        if len(seen) == 2:
            raise KeyboardInterrupt

    results = runner.run(request(*TINY, passes=("inference",), peers=("torch",)), on_case)
    assert results.interrupted
    assert {r["case"]["cell"] for r in results.records} == {"LSTM"}
    assert "Interrupted" in report.render(records.document(results))


@pytest.mark.usefixtures("tiny_suite")
def test_json_is_exactly_what_the_api_promises(tmp_path: Path) -> None:
    path = tmp_path / "new.json"
    assert cli.main(["bench", "--seconds", "0.01", "--threads", "1", "--json", str(path)]) == 0
    document = json.loads(path.read_text())
    assert {"machine", "versions", "commit", "date"} <= set(document["header"])
    for record in document["records"]:
        assert list(record) == list(records.RECORD_FIELDS)
        assert set(record["case"]) == {
            "cell", "T", "B", "I", "H", "layers", "bidirectional", "dtype",
        }  # fmt: skip
        assert 0 < record["p10_ms"] <= record["median_ms"] <= record["p90_ms"]
        flops = Case(**record["case"]).flops(record["pass"])
        assert record["gflops"] == pytest.approx(flops / record["median_ms"] / 1e6)
        assert record["peak_fraction"] == pytest.approx(record["gflops"] / record["peak_gflops"])
        assert 0 < record["peak_fraction"] <= record["roof_fraction"] * (1 + 1e-9)
    best = {
        record["pass"]: record["ratio_to_best_peer"]
        for record in document["records"]
        if record["provider"] == "torch" and record["case"]["cell"] == "LSTM"
    }
    assert best["training"] == 1.0  # torch is the only peer there


@pytest.mark.usefixtures("tiny_suite")
def test_a_run_compares_with_an_old_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "old.json"
    options = ["bench", "--seconds", "0.01", "--threads", "1", "--against", "torch"]
    assert cli.main([*options, "--json", str(path)]) == 0
    capsys.readouterr()
    assert cli.main([*options, "--cell", "gru", "--compare", str(path)]) == 0
    output = capsys.readouterr().out
    assert "geometric mean old / new" in output
    assert "not compared: 0 only in this run, 4 only in the old one" in output


def test_the_ratio_of_a_comparison_is_old_over_new() -> None:
    new = records.document(runner.run(request(TINY[0], passes=("inference",), peers=("torch",))))
    old = json.loads(json.dumps(new))
    for record in old["records"]:
        record["median_ms"] *= 2
    assert [b["median_ms"] / n["median_ms"] for b, n in compare.compare(old, new)] == [2.0]
    assert "geometric mean old / new: 2.00" in compare.render(old, new)


def test_a_file_of_the_first_version_is_read(tmp_path: Path) -> None:
    """It has one roof for all cases, torch's product, and no bandwidths."""
    document = records.document(runner.run(request(TINY[0], peers=("torch",))))
    document["header"]["roof"] = {"float32": {"gflops": 8.0, "method": "torch's product"}}
    del document["header"]["bandwidth"]
    for record in document["records"]:
        del record["peak_gflops"], record["peak_fraction"]
    path = tmp_path / "old.json"
    records.save(document, path)
    old = records.load(path)
    assert {r["peak_gflops"] for r in old["records"]} == {8.0}
    assert "peak: 8 GFLOP/s, torch's product" in report.render(old)
    assert len(compare.compare(old, old)) == 2


def test_the_peak_is_measured_beside_every_case(monkeypatch: pytest.MonkeyPatch) -> None:
    peaks = iter([5.0, 1.0, 3.0, 9.0, 4.0])
    monkeypatch.setattr(timing, "ROUNDS", 5)
    monkeypatch.setattr(timing, "FEWEST_ROUNDS", 5)
    monkeypatch.setattr(roof.CpuRoof, "sample_peak", lambda self, dtype: next(peaks))
    results = runner.run(request(TINY[0], passes=("inference",), peers=("torch",)))
    assert [r["peak_gflops"] for r in results.records] == [4.0, 4.0, 4.0]


def test_the_table_shows_the_peak_where_it_is_not_the_roof(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On CUDA the two are the same."""
    small = request(TINY[0], passes=("inference",), peers=())
    monkeypatch.setattr(_C, "read_bandwidth", lambda size, threads, seconds: 1.0)
    columns = report.cases(runner.run(small).records).columns
    assert {"peak", "roof"} < set(columns)
    monkeypatch.setattr(roof, "_best_product", lambda dtype: 7.0)
    monkeypatch.setattr(runner, "make_roof", lambda device, threads: roof.CudaRoof())
    results = runner.run(small)
    assert {r["peak_gflops"] for r in results.records} == {7.0}
    assert [c for c in columns if c != "peak"] == report.cases(results.records).columns
    assert "reading" not in report.render(records.document(results))


def test_a_file_that_is_no_benchmark_cannot_be_compared(tmp_path: Path) -> None:
    path = tmp_path / "other.json"
    path.write_text('{"header": {}, "records": [{"suite": "quick"}]}')
    with pytest.raises(ValueError, match="a record lacks case, device"):
        records.load(path)


@pytest.mark.usefixtures("tiny_suite")
@pytest.mark.parametrize("option", ["--plot", "--roofline"])
def test_a_plot_is_a_picture(option: str, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "new.png"
    options = ["bench", "--seconds", "0.01", "--pass", "inference", "--against", "torch"]
    assert cli.main([*options, option, str(path)]) == 0
    assert path.read_bytes().startswith(b"\x89PNG")


@pytest.mark.usefixtures("tiny_suite")
@pytest.mark.parametrize(("name", "given"), [("new.text", ".text"), ("new", "no ending")])
def test_a_format_of_a_picture_that_is_not_known_is_an_error_before_the_run(
    name: str, given: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    assert cli.main(["bench", "--seconds", "0.01", "--plot", str(tmp_path / name)]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "expected the name of a picture that ends in one of " in captured.err
    assert " .png, " in captured.err
    assert f"got {given}\n" in captured.err


def quiet_document() -> dict[str, Any]:
    """A run whose times and shares are those of a quiet machine."""
    small = request(*TINY, passes=("inference",), peers=("torch",))
    document = records.document(runner.run(small))
    for record in document["records"]:
        record["p10_ms"], record["p90_ms"] = 1.0, 1.1
        record["peak_fraction"], record["roof_fraction"] = 0.5, 0.6
    document["header"] |= {"others": 0.1, "threads": 1, "thread_counts": [1]}
    document["header"]["machine"]["cores"] = 2
    return document


def test_the_report_warns_of_a_busy_machine() -> None:
    document = quiet_document()
    assert "Warning" not in report.render(document)
    for record in document["records"][::2]:
        record["p90_ms"] = 2.0
    assert "in 5 of 9 measurements the 90th percentile is more" in report.render(document)


def test_the_report_warns_of_other_processes() -> None:
    document = quiet_document()
    document["header"]["others"] = 2.0
    printed = report.render(document)
    assert "other processes used 2.0 of 2 cores, the benchmark 1" in printed
    document["header"]["machine"]["cores"] = 16
    assert "Warning" not in report.render(document)
    document["header"]["machine"]["cores"] = 2
    document["header"]["others"] = None  # not known
    assert "Warning" not in report.render(document)


def test_the_report_warns_of_shares_that_cannot_be() -> None:
    document = quiet_document()
    document["records"][0]["peak_fraction"] = 1.2
    assert "1 measurements exceed the peak or the roof" in report.render(document)
    document["records"][0]["case"]["dtype"] = "bfloat16"  # it has products of pairs
    assert "Warning" not in report.render(document)


def test_the_run_notes_what_other_processes_use(monkeypatch: pytest.MonkeyPatch) -> None:
    header = records.document(runner.run(request(TINY[0], peers=())))["header"]
    assert header["thread_counts"] == [1]
    assert (header["others"] is None) == (not Path("/proc/stat").exists())
    seconds, clock = iter([10.0, 13.0]), iter([100.0, 102.0])
    monkeypatch.setattr(runner, "_seconds_of_others", lambda: next(seconds))
    monkeypatch.setattr(runner.time, "monotonic", lambda: next(clock, 102.0))
    assert runner.run(request(TINY[0], peers=())).others == 1.5


def test_the_time_of_others_leaves_out_waiting_and_the_runs_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stat = "cpu  100 20 30 4000 50 6 7 8 0 0\ncpu0 1 2 3 4 5 6 7 8 0 0\n"
    monkeypatch.setattr(runner.Path, "read_text", lambda path, encoding: stat)
    monkeypatch.setattr(runner.os, "sysconf", lambda name: 100, raising=False)
    monkeypatch.setattr(runner.os, "times", lambda: (0.5, 0.25, 0.125, 0.125, 9.0))
    assert runner._seconds_of_others() == pytest.approx(1.71 - 1.0)


@pytest.mark.parametrize("suite", [*cases.load_suites()])
def test_the_report_fits_80_columns(suite: str) -> None:
    """Of every suite, with times and shares as wide as they get."""
    document = quiet_document()
    template = document["records"][0]
    document["records"] = [
        template | {"suite": name, "case": case.as_record(), "pass": pass_, "provider": provider}
        | {"median_ms": 0.0431, "p10_ms": 0.0342, "p90_ms": 12345.0, "ratio_to_best_peer": 12.34}
        for name in (suite, "deepbench-training")
        for case in cases.load_suites()[suite]
        for pass_ in cases.PASSES
        for provider in ("fastrnn", "frozen", "stream", "torch", "onnxruntime")
    ]  # fmt: skip
    document["not_run"] = [{"suite": suite, "provider": "torch", "pass": "inference",
                            "case": None, "reason": "a reason of many words " * 6}]  # fmt: skip
    for counts in ([1], [1, 2, 4, 8, 16]):
        document["header"]["thread_counts"] = counts
        if len(counts) > 1:
            document["records"] = [
                r | {"threads": count} for r in document["records"] for count in counts
            ]
        printed = report.render(document)
        assert max(map(len, printed.splitlines())) <= report.WIDTH
        assert all(f" {name} " in printed for name in ("frozen", "stream", "onnxruntime"))
    assert len(report.cases(document["records"]).text().splitlines()[0]) > report.WIDTH


def test_every_provider_has_its_spread_in_both_tables() -> None:
    document = quiet_document()
    for i, record in enumerate(document["records"]):
        record["p10_ms"], record["p90_ms"] = 100.0 + i, 200.0 + i
    for wide in (False, True):
        printed = report.render(document, wide)
        assert all(f" {100 + i}-{200 + i}" in printed for i in range(9))


@pytest.mark.usefixtures("tiny_suite")
def test_several_numbers_of_threads_print_side_by_side(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "new.json"
    options = ["bench", "--seconds", "0.01", "--against", "torch", "--cell", "GRU"]
    assert cli.main([*options, "--threads", "1,2,1", "--json", str(path)]) == 0
    printed = capsys.readouterr().out
    assert "1, 2 threads, cpu" in printed
    header = next(line for line in printed.splitlines() if line.startswith("case and pass"))
    assert header.split() == "case and pass ms, threads: 1 2 gain".split()
    document = records.load(path)
    assert document["header"]["thread_counts"] == [1, 2]
    assert document["header"]["threads"] == 2
    assert {r["threads"] for r in document["records"]} == {1, 2}
    one, two = (
        next(r for r in document["records"] if r["threads"] == n and r["provider"] == "frozen")
        for n in (1, 2)
    )
    row = next(line for line in printed.splitlines() if " frozen " in line)
    assert row.split()[-1] == f"{one['median_ms'] / two['median_ms']:.2f}"


def test_a_plot_of_several_numbers_of_threads_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    assert cli.main(["bench", "--threads", "1,2", "--plot", str(tmp_path / "new.png")]) == 2
    assert "a plot is of one number of threads" in capsys.readouterr().err


def test_the_report_ends_with_geometric_means_by_suite() -> None:
    document = records.document(runner.run(request(*TINY, passes=("inference",), peers=("torch",))))
    lines = {line.split()[2]: line.split() for line in report.render(document).splitlines()[-2:]}
    for way in ("fastrnn", "frozen"):
        mine = [r["ratio_to_best_peer"] for r in document["records"] if r["provider"] == way]
        mean = f"{statistics.geometric_mean(mine):.2f}"
        assert lines[way][:6] == ["tiny", "inference", way, "3", mean, mean]  # torch is the best


@pytest.fixture
def beside(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets a test import the scripts of benchmarks/."""
    monkeypatch.syspath_prepend(Path(__file__).resolve().parents[1] / "benchmarks")


@pytest.mark.usefixtures("beside")
def test_a_page_of_results_has_every_way_and_its_spread() -> None:
    pages = importlib.import_module("pages")
    document = quiet_document()
    for record in document["records"]:
        record["p10_ms"], record["p90_ms"] = 3.0, 4.0
    text = pages.page(document, "machine-tiny.json")
    assert "| frozen ms | p10-p90 | torch ms | p10-p90 | ratio |" in text
    assert text.count("| 3.00-4.00 |") == 9
    document["records"] = [r for r in document["records"] if r["provider"] != "frozen"]
    assert "frozen" not in pages.page(document, "machine-tiny.json")  # as in older files


@pytest.mark.usefixtures("beside")
def test_the_prediction_is_the_engines_estimate(monkeypatch: pytest.MonkeyPatch) -> None:
    predict = importlib.import_module("predict_scaling")
    wide = Case("LSTM", 50, 1024, 256, 256)
    assert predict.gain(wide, 1) == 1.0
    assert predict.gain(wide, 8) == pytest.approx(8, rel=0.01)  # rows never wait for each other
    assert predict.gain(Case("LSTM", 1, 1, 32, 32), 8) == 1.0  # too small to divide
    if not _C.isa().startswith("avx512"):
        pytest.skip("the page has the estimate for AVX-512")
    monkeypatch.setattr(sys, "argv", ["predict_scaling.py", "--check"])
    assert predict.main() == 0


def test_an_estimate_is_of_a_call_with_sizes() -> None:
    options = _C.Options(cell="LSTM", num_layers=2)
    time = [_C.estimated_time(options, "float32", T, 8, 16, 32, 1) for T in (10, 20)]
    assert 0 < 1.9 * time[0] < time[1] < 2.1 * time[0]
    with pytest.raises(ValueError, match="expected 1 or more"):
        _C.estimated_time(options, "float32", 0, 8, 16, 32, 1)
    with pytest.raises(ValueError, match="threads: expected 0"):
        _C.estimated_time(options, "float32", 1, 8, 16, 32, -1)
    with pytest.raises(ValueError, match="dtype: expected float32"):
        _C.estimated_time(options, "int32", 1, 8, 16, 32, 1)


def test_flops_of_a_stack_by_hand() -> None:
    # Two directions: layer 0 reads 5 inputs, layer 1 the 8 of both; 4 gates of 4 units.
    first, second = 2 * 16 * (5 + 4) * 2, 2 * 16 * (8 + 4) * 2
    assert STACK.flops("inference") == (first + second) * 3 * 2
    assert STACK.flops("training") == 3 * STACK.flops("inference")


def test_every_case_of_every_suite_has_its_own_record() -> None:
    for name, suite in cases.load_suites().items():
        named = [json.dumps(case.as_record(), sort_keys=True) for case in suite]
        assert len(named) == len(set(named)), name


def test_flashrnn_is_refused_on_the_cpu() -> None:
    from fastrnn.bench import flashrnn_provider

    case = TINY[0]
    with pytest.raises(UnsupportedError, match="only on CUDA"):
        flashrnn_provider._require_supported(case, make_data(case, "cpu"))


@pytest.mark.parametrize(
    "part", "memory contention lengths step stream recompute bfloat16 scaling".split()
)
def test_every_part_of_the_goals_is_measured(
    part: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if part in ("memory", "recompute") and sys.platform != "linux":
        pytest.skip("reads /proc")
    monkeypatch.syspath_prepend(Path(__file__).resolve().parents[1] / "benchmarks")
    goals = importlib.import_module("goals")
    if part == "recompute":  # one process for the three; the part memory has the other two

        def needed(options: Any, case: Case, pass_: str, libraries: Any) -> dict[str, float]:
            return dict.fromkeys(
                libraries, measured(options, case, pass_, [goals.RECOMPUTE]).popitem()[1]
            )

        measured = goals._needed
        monkeypatch.setattr(goals, "_needed", needed)
    path = tmp_path / "goals.json"
    options = ["--tiny", "--seconds", "0.01", "--threads", "1", "--json", str(path)]
    assert goals.main([part, *options]) == 0
    rows = json.loads(path.read_text())["parts"][part]
    assert rows
    assert all({"case", "what"} & set(row) for row in rows)
    printed = capsys.readouterr().out
    for column in rows[0]:
        assert column in printed


def test_the_goals_name_a_part_that_is_not_known(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(Path(__file__).resolve().parents[1] / "benchmarks")
    with pytest.raises(SystemExit):
        importlib.import_module("goals").main(["everything"])
    assert "part 'everything' is not known; there are: memory" in capsys.readouterr().err


def test_a_turn_begins_when_no_thread_works(monkeypatch: pytest.MonkeyPatch) -> None:
    class Machine:  # threads that work for 45 ms more
        now = worked = 0.0

        def sleep(self, seconds: float) -> None:
            self.worked += min(seconds, max(0.0, 0.045 - self.now))
            self.now += seconds

        def monotonic(self) -> float:
            return self.now

        def process_time(self) -> float:
            return self.worked

    machine = Machine()
    monkeypatch.setattr(timing, "time", machine)
    timing.rest()
    assert 0.045 < machine.now < 0.06
