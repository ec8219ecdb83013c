"""The campaign's command line: see `fuzz`."""

from __future__ import annotations

import argparse
import contextlib
import os
import resource
import select
import signal
import sys
import time
import traceback
import warnings
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # two threads on a core must not spin

import torch
import torch._dynamo  # torch imports it late, and every batch would do so for itself

from . import calls, verdict
from .draw import Draw

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


MEMORY = 2**31  # bytes that calls may ask for; a call that asks for more gets an error


def finding(
    seed: int, index: int, say: Callable[[str], None], *, aloud: bool = False
) -> tuple[str, str | None]:
    """Make one call. Returns how it ended, in a word, and what is wrong with that.

    It writes "theirs" before it calls torch.nn, which has its own crashes, and "begun" after.
    """
    draw = Draw(f"{seed}:{index}")
    call = calls.draw_call(draw)
    title = f"{call.title}; {', '.join(draw.notes) or 'as it should be'}"
    if aloud:
        print(title, flush=True)
    ours, error = outcome(call.ours)
    say("theirs")
    expected, by_torch = outcome(call.expected) if call.expected else (None, None)
    say("begun")
    if error is not None:
        if aloud:
            traceback.print_exception(error)
            print("torch.nn:", repr(by_torch) if by_torch else "no error, or not asked")
        what = verdict.unclear(error, call.names, by_torch)
        if not draw.broken:
            what = "a valid call is refused"
        if what is None:
            return "error" if expected is None else "stricter than torch.nn", None
        return "error", f"{title} → {what}: {type(error).__name__}: {' '.join(str(error).split())}"
    if expected is None or not draw.finite:
        return "result", None
    where = verdict.differ(ours, expected)
    return "compared", where and f"{title} → {where}"


def outcome(function: Callable[[], Any]) -> tuple[Any, Exception | None]:
    """What a function gives, or its error; both sides draw the same random numbers."""
    torch.manual_seed(0)
    try:
        return function(), None
    except Exception as error:
        return None, error


def work(seed: int, numbers: range, pipe: int) -> None:
    """Make calls, and say before each which it is, after each what became of it."""
    warnings.simplefilter("ignore")
    with os.fdopen(pipe, "w", encoding="utf-8", buffering=1) as out:
        for index in numbers:
            print(f"begin\t{index}", file=out)
            try:
                kind, what = finding(seed, index, lambda word: print(word, file=out))
            except Exception:
                kind, what = "broken", "the campaign itself: " + traceback.format_exc()
            print(f"{kind}\t{' '.join(what.split()) if what else ''}", file=out)


def limit_memory() -> None:
    """Limits how much more memory this process may take, where the system tells its size."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
    except OSError:
        return
    _, most = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MEMORY, most))


def threads_of(process: int) -> list[list[str]]:
    """The fields of each thread's /proc/…/stat from its state on; none where there is no such."""
    found = []
    for file in Path(f"/proc/{process}/task").glob("*/stat"):
        with contextlib.suppress(OSError):  # the thread has just ended
            found.append(file.read_text().rpartition(")")[2].split())
    return found


def cpu_time(process: int) -> float:
    ticks = sum(int(fields[11]) + int(fields[12]) for fields in threads_of(process))
    return ticks / os.sysconf("SC_CLK_TCK")


def waits_for_a_core(process: int) -> bool:
    """Whether a thread could go on: what is slow on a busy machine is no hang."""
    return any(fields[0] == "R" for fields in threads_of(process))


def batch(seed: int, numbers: range, patience: float) -> Iterator[tuple[int, str, str]]:
    """Make calls in a process of its own: number, how it ended, what is wrong."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        limit_memory()
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # what torch says there is no finding
        try:
            work(seed, numbers, writing)
        finally:
            os._exit(0)
    os.close(writing)
    index, ended = numbers.start, ""
    read, hangs = b"", False
    while not hangs:
        *lines, read = read.split(b"\n")
        for line in lines:
            kind, _, rest = line.decode().partition("\t")
            if kind == "begin":
                index, ended = int(rest), "begun"
            elif kind in ("theirs", "begun"):
                ended = kind
            else:
                ended = kind
                yield index, kind, rest
        begun = cpu_time(child)
        while not (ready := select.select([reading], [], [], patience)[0]):
            if not waits_for_a_core(child) or cpu_time(child) - begun >= patience:
                break
        hangs = not ready
        more = b"" if hangs else os.read(reading, 2**16)
        if not more:
            break
        read += more
    os.close(reading)
    if hangs:
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    if ended == "theirs":
        yield index, "hang of torch.nn" if hangs else "crash of torch.nn", ""
    elif hangs:
        yield index, "hang", f"no answer for {patience} s"
    elif ended == "begun" or code != 0:
        yield index, "crash", f"the process ended with {code}"


def campaign(
    seed: int, first: int, count: int, size: int = 500, patience: float = 60
) -> Counter[str]:
    """Make `count` calls, `size` in a process; print findings as they come.

    A call without an answer after `patience` seconds, which sleeps or has had as long a time on a
    core, is a hang.
    """
    ends: Counter[str] = Counter()
    start, last = first, first + count
    while start < last:
        numbers = range(start, min(start + size, last))
        index = start
        for index, kind, what in batch(seed, numbers, patience):
            ends[kind] += 1
            if what:
                ends["findings"] += 1
                print(f"--seed {seed} --only {index}: {kind}: {what[:1000]}", flush=True)
        start = index + 1  # after a crash or a hang with the call behind it
        if sys.stderr.isatty():
            print(f"\r{start - first} of {count} calls", end="", file=sys.stderr, flush=True)
    return ends


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m fuzz", description=__doc__)
    parser.add_argument("--seed", type=int, default=int(time.time()), help="of all calls")
    parser.add_argument("--calls", type=int, default=20000, help="how many")
    parser.add_argument("--first", type=int, default=0, help="number of the first call")
    parser.add_argument("--batch", type=int, default=500, help="calls in a process")
    parser.add_argument("--patience", type=float, default=60, help="seconds until a hang is one")
    parser.add_argument("--only", type=int, help="repeat the call of this number, in this process")
    given = parser.parse_args()
    if given.only is not None:
        kind, what = finding(given.seed, given.only, print, aloud=True)
        print(f"{kind}: {what or 'nothing wrong'}")
        return 1 if what else 0
    began = time.monotonic()
    ends = campaign(given.seed, given.first, given.calls, given.batch, given.patience)
    findings = ends.pop("findings", 0)
    told = ", ".join(f"{number} {kind}" for kind, number in sorted(ends.items()))
    print(f"seed {given.seed}: {sum(ends.values())} calls in {time.monotonic() - began:.0f} s:")
    print(f"{told}; {findings} findings")
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main())
