"""Steps per second and memory of a training step, adapter by adapter, against `peft` and `lycoris-lora`.

One layer, one adapter, the base frozen: forward, backward, optimizer step of the adapter's parameters. An *inner* layer
passes the gradient on to its input; a *first* one does not. All packages are measured in one process, in rounds, each
round in a fresh order; what is told is the median over the rounds of the ratio within a round. PEFT stands twice in every
round: PEFT against itself is the retest, the noise that any other ratio is to be read with.

Memory is of a process per package: `tracked`, the most that torch's allocator held above what it held before the step;
`kept`, what lies between forward and backward beyond the input and the output; `rss`, the peak of the resident set above
its size before the steps, with a C allocator that returns what is freed.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ..peers.networks import ROOT
from .choices import some_of
from .subjects import KINDS, LAYERS, OURS, PEERS, PEFT, Subject, subject

AGAIN = "again"
#: Steps per second as a multiple of PEFT's that each kind must reach on both layers, gradients passed on.
MUSTS = {"lora": 1.0, "loha": 1.5, "lokr": 1.5}
_PLACES = {"inner": True, "first": False}
#: A visit is at least this long, so that the clock and the change of subject do not count.
_VISIT_SECONDS = 0.05
_MIB = 1 << 20


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add this part's options."""
    group = parser.add_argument_group("speed")
    group.add_argument("--rounds", type=int, default=15, help="rounds per layer, kind and thread count")
    group.add_argument("--kinds", type=some_of(KINDS), default=list(KINDS), help="kinds, separated by commas")
    group.add_argument("--layers", type=some_of(LAYERS), default=list(LAYERS), help="layers, separated by commas")
    group.add_argument("--rank", type=int, default=8)
    group.add_argument("--thread-counts", default="1,2")


def run(options: argparse.Namespace, tell: Callable[[str], None]) -> dict[str, Any]:
    """Measure every case in processes of its own."""
    layers, kinds = options.layers, options.kinds
    places = [(p, t) for t in options.thread_counts.split(",") for p in _PLACES]
    of_memory = [(n, k, p, 1) for n in layers for k in kinds for p in (OURS, *PEERS.get(k, ()))]
    of_speed = [(n, k, p, int(t)) for n in layers for k in kinds for p, t in places]
    found: dict[str, Any] = {"rank": options.rank, "rounds": options.rounds}
    for what, cases in (("memory", of_memory), ("speed", of_speed)):
        found[what] = []
        for case in _measured(what, cases, options):
            found[what].append(case)
            told = f"{case['tracked_bytes'] / _MIB:.2f} MiB" if what == "memory" else _ratios(case)
            tell(f"{what} {case['layer']} {case['kind']} {case['which']}, {case['threads']} threads: {told}")
    return found


def _measured(what: str, cases: list[tuple[Any, ...]], options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield the numbers of each case, as a worker with an environment of its own prints them, one line each."""
    # Threads that spin while they wait fight with whatever else the machine does.
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_WAIT_POLICY": "PASSIVE"}
    if what == "memory":
        environment |= {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}
    told = json.dumps({"what": what, "cases": cases, "rank": options.rank, "rounds": options.rounds})
    command = [sys.executable, "-W", "ignore", "-m", __name__, told]
    with (
        tempfile.TemporaryFile("w+") as said,  # the profiler and the packages talk
        subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=said, text=True) as worker,
    ):
        assert worker.stdout is not None
        for line in worker.stdout:
            if line.startswith("{"):
                yield json.loads(line)
        if worker.wait():
            said.seek(0)
            raise RuntimeError(f"{what}: the worker ended with {worker.returncode}: {said.read()[-500:]}")


# in the worker -------------------------------------------------------------------------------------------------------


def measure_speed(kind: str, layer: str, place: str, *, rank: int, rounds: int) -> dict[str, Any]:
    """Return, per package, the seconds of a step in every round."""
    through = _PLACES[place]
    subjects = [subject(p, kind, layer, rank=rank, through=through) for p in (OURS, *PEERS.get(kind, ()))]
    subjects.append(subject(PEFT if kind in PEERS else OURS, kind, layer, rank=rank, through=through, name=AGAIN))
    for s in subjects:
        s.step()
    started = time.perf_counter()
    subjects[0].step()
    steps = max(1, round(_VISIT_SECONDS / (time.perf_counter() - started)))
    wall: dict[str, list[float]] = {s.name: [] for s in subjects}
    cpu: dict[str, list[float]] = {s.name: [] for s in subjects}
    order = random.Random(0)
    for _ in range(rounds):
        order.shuffle(subjects)
        for s in subjects:
            before = time.perf_counter(), time.process_time()
            for _ in range(steps):
                s.step()
            wall[s.name].append((time.perf_counter() - before[0]) / steps)
            cpu[s.name].append((time.process_time() - before[1]) / steps)
    return {"wall_seconds": wall, "cpu_seconds": cpu, "n_params": {s.name: s.n_params for s in subjects}}


def measure_memory(kind: str, layer: str, package: str, *, rank: int) -> dict[str, Any]:
    """Return the peaks of a step of an inner layer, and what it keeps for its backward pass."""
    s = subject(package, kind, layer, rank=rank, through=True)
    for _ in range(3):
        s.step()
    return {"rss_bytes": _rss_peak(s), "tracked_bytes": _tracked_peak(s), "kept_bytes": _kept(s)}


def _rss_peak(s: Subject) -> int:
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    before = _status("VmRSS")
    for _ in range(5):
        s.step()
    return _status("VmHWM") - before


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":"))


def _tracked_peak(s: Subject) -> int:
    """Return the peak of the running sum of what torch allocated and freed in one step."""
    import torch

    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        s.step()
    with tempfile.TemporaryDirectory() as folder:
        profile.export_chrome_trace(str(Path(folder) / "trace.json"))
        events = json.loads((Path(folder) / "trace.json").read_text())["traceEvents"]
    changes = sorted((e["ts"], e["args"]["Bytes"]) for e in events if e.get("name") == "[memory]")
    held = peak = 0
    for _, change in changes:
        held += change
        peak = max(peak, held)
    return peak


def _kept(s: Subject) -> int:
    """Return the bytes of the tensors saved for backward, each storage once; input and parameters not counted."""
    import torch

    seen: dict[int, int] = {}
    held = []  # a storage that is freed could lend its address to another

    def pack(t: torch.Tensor) -> torch.Tensor:
        storage = t.untyped_storage()
        seen[storage.data_ptr()] = storage.nbytes()
        held.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        x = s.x.detach().requires_grad_(s.through)
        y = s.layer(x)
    known = {t.untyped_storage().data_ptr() for t in (x, y, *s.layer.parameters())}
    return sum(n for pointer, n in seen.items() if pointer not in known)


def main() -> int:
    """Measure the cases of one worker, each in a process forked from this one, which has imported and run nothing else."""
    import lycoris  # noqa: F401
    import peft  # noqa: F401

    import lrcompress.model.surgery  # noqa: F401

    asked = json.loads(sys.argv[1])
    for case in asked["cases"]:
        # A fresh fork per case: no allocator and no thread pool has seen another one.
        with multiprocessing.get_context("fork").Pool(1) as pool:
            print(json.dumps(pool.apply(_case, (asked["what"], *case, asked["rank"], asked["rounds"]))), flush=True)
    return 0


def _case(what: str, layer: str, kind: str, which: str, threads: int, rank: int, rounds: int) -> dict[str, Any]:
    import torch

    torch.set_num_threads(threads)
    if what == "speed":
        numbers = measure_speed(kind, layer, which, rank=rank, rounds=rounds)
    else:
        numbers = measure_memory(kind, layer, which, rank=rank)
    return {"layer": layer, "kind": kind, "which": which, "threads": threads, **numbers}


# the table -----------------------------------------------------------------------------------------------------------


def ratio(case: dict[str, Any], over: str, under: str, clock: str = "wall_seconds") -> tuple[float, float, float]:
    """Return median and quartiles of how many steps `under` makes while `over` makes one, round by round."""
    found = [a / b for a, b in zip(case[clock][over], case[clock][under], strict=True)]
    low, middle, high = statistics.quantiles(found, n=4)
    return middle, low, high


def _ratios(case: dict[str, Any]) -> str:
    return ", ".join(f"{n} {ratio(case, n, OURS)[0]:.2f}" for n in case["wall_seconds"] if n != OURS)


def text(found: dict[str, Any]) -> str:
    """Return the tables of speed and memory."""
    return "\n".join([*_speed_lines(found), "", *_memory_lines(found)])


def _speed_lines(found: dict[str, Any]) -> Iterator[str]:
    yield (
        f"{'layer':8}{'kind':6}{'place':7}{'threads':>8}{'ours ms':>9}{'× peft':>8}{'(quartiles)':>15}{'cpu':>7}"
        f"{'× lycoris':>11}{'peft × peft (quartiles)':>26}{'must':>7}"
    )
    for case in found["speed"]:
        line = f"{case['layer']:8}{case['kind']:6}{case['which']:7}{case['threads']:8}"
        line += f"{statistics.median(case['wall_seconds'][OURS]) * 1000:9.2f}"
        if PEFT in case["wall_seconds"]:
            middle, low, high = ratio(case, PEFT, OURS)
            again = ratio(case, AGAIN, PEFT)
            cpu = ratio(case, PEFT, OURS, "cpu_seconds")[0]
            must = f"≥ {MUSTS[case['kind']]}"
            line += f"{middle:8.2f}{f'({low:.2f}–{high:.2f})':>15}{cpu:7.2f}"
            line += f"{ratio(case, 'lycoris', OURS)[0]:11.2f}{f'{again[0]:.2f} ({again[1]:.2f}–{again[2]:.2f})':>26}"
            line += f"{must if case['which'] == 'inner' else '':>7}"
        yield line


def _memory_lines(found: dict[str, Any]) -> Iterator[str]:
    yield f"{'layer':8}{'kind':6}{'package':12}{'tracked MiB':>12}{'kept MiB':>10}{'rss MiB':>9}"
    for case in found["memory"]:
        sizes = (case[f"{n}_bytes"] / _MIB for n in ("tracked", "kept", "rss"))
        yield f"{case['layer']:8}{case['kind']:6}{case['which']:12}{next(sizes):12.2f}{next(sizes):10.2f}{next(sizes):9.1f}"


if __name__ == "__main__":
    sys.exit(main())
