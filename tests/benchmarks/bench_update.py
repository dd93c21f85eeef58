"""What an update costs a device: `make bench-update`, `ARGS=--json` for one JSON object.

Bytes on the wire, requests, fsyncs and bytes written of a first contact, updates, a rollback and an idle poll, each with
its trial in a process of its own, as it ships; the time of a swap; start-up and memory of a process that looks, one that
polls, one that updates and one that serves. A small network (5,000 parameters), so that what is counted is the
machinery; the payload's own bytes stand beside.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from lrcompress import publish
from lrcompress.cli.output import table
from lrcompress.edge import Device
from lrcompress.payload import parse
from lrcompress.runtime import Session
from tests.support.fleet import PASSPHRASE, Fleet, X, made, served

ROOT = Path(__file__).parents[2]
SWAPS, STARTS = 1000, 5
PROCESSES = {
    "numpy + onnxruntime": "bare: imports them, loads nothing",
    "status": "opens the device and looks",
    "poll": "polls, finds nothing new",
    "update": "takes an update, trial included",
    "serve": "loads the model and answers once",
}

# VmHWM, not ru_maxrss: the latter starts at what the parent had when it forked.
PROCESS = """
import json, sys
what, folder, x = sys.argv[1:]
if what == "numpy + onnxruntime":
    import numpy, onnxruntime
else:
    import numpy as np
    from lrcompress.edge import Device, EdgeSession
    if what == "serve":
        EdgeSession(folder).run({"x": np.load(x)})
    else:
        device = Device(folder)
        if what != "status":
            said = device.update()
            assert said["state"] == {"poll": "up_to_date", "update": "updated"}[what], said
print("done", flush=True)
import resource
status = dict(line.split(":", 1) for line in open("/proc/self/status"))
children = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
print(json.dumps({"rss_bytes": int(status["VmRSS"].split()[0]) << 10, "peak_bytes": int(status["VmHWM"].split()[0]) << 10, "trial_peak_bytes": children}))
"""


def process(what: str, folder: Path, x: Path) -> dict[str, float]:
    """Return the ms from the start of a process until it has done `what`, and its memory."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", PROCESS, what, str(folder), str(x)]
    started = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as child:
        assert child.stdout is not None and child.stdout.readline() == "done\n", what
        ms = (time.perf_counter() - started) * 1000
        return {"ms": ms, **json.loads(child.stdout.readline())}


def processes(fleet: Fleet) -> dict[str, dict[str, float]]:
    """Return the median of some starts of each process; they take turns."""
    x, found = fleet.folder / "x.npy", {what: list[dict[str, float]]() for what in PROCESSES}
    np.save(x, X[:1])
    for i in range(STARTS):
        for what in PROCESSES:
            if what == "update":
                fleet.add(("first", "second")[i % 2])
            found[what].append(process(what, fleet.at, x))
    return {w: {k: statistics.median(r[k] for r in rows) for k in rows[0]} for w, rows in found.items()}


def updates(fleet: Fleet) -> dict[str, dict[str, float]]:
    """Return what each kind of update moved, asked for and wrote."""
    rows: dict[str, dict[str, float]] = {}

    def note(what: str, payload_bytes: int) -> None:
        said = Device(fleet.at).update()
        assert said["error"] is None, said
        kept = {k: said[k] for k in ("requests", "fsyncs", "bytes_written", "ms")}
        rows[what] = {
            "payload_bytes": payload_bytes,
            "metadata_bytes": said["bytes_downloaded"] - payload_bytes,
            **kept,
        }

    note("first contact, no release", 0)
    note("first update", fleet.add("first")["payload_bytes"])
    note("update", fleet.add("second")["payload_bytes"])
    note("idle poll", 0)
    publish.rollback(fleet.repo, 1, passphrase=PASSPHRASE)
    note("published rollback", 0)
    return rows


def swaps(fleet: Fleet) -> dict[str, float]:
    """Return how long it takes to verify, copy and take a payload that is in memory."""
    session, times = Session(made() / "exported"), []
    hashes = [r["sha256"] for r in publish.status(fleet.repo)["groups"][0]["releases"]]
    payloads = [parse(fleet.payload(sha256).read_bytes()) for sha256 in dict.fromkeys(hashes)]
    for i in range(SWAPS):
        started = time.perf_counter()
        session.swap(payloads[i % len(payloads)])
        times.append((time.perf_counter() - started) * 1000)
    return {"n": SWAPS, "median_ms": statistics.median(times), "p99_ms": sorted(times)[int(0.99 * SWAPS)]}


def measure(folder: Path) -> dict[str, Any]:
    fleet = Fleet(folder)
    with served(fleet.repo) as url:
        (fleet.at / "device.json").write_text(json.dumps({"schema": 1, "url": url}))
        return {"updates": updates(fleet), "swap": swaps(fleet), "processes": processes(fleet)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true")
    as_json = parser.parse_args().json
    with tempfile.TemporaryDirectory(prefix="lrcompress-bench-") as folder:
        found = measure(Path(folder))
    if as_json:
        print(json.dumps(found))
        return
    columns = ["payload_bytes", "metadata_bytes", "requests", "fsyncs", "bytes_written", "ms"]
    lines = [[name, *(f"{row[c]:.0f}" for c in columns)] for name, row in found["updates"].items()]
    print(table(["", "payload B", "metadata B", "requests", "fsyncs", "written B", "ms"], lines))
    swap = found["swap"]
    print(f"\nswap, of {swap['n']}: median {swap['median_ms']:.2f} ms, p99 {swap['p99_ms']:.2f} ms\n")
    lines = [
        [PROCESSES[name], *(f"{row[c]:.0f}" if c == "ms" else f"{row[c] / 2**20:.0f}" for c in ("ms", "rss_bytes", "peak_bytes", "trial_peak_bytes"))]
        for name, row in found["processes"].items()
    ]  # fmt: skip
    print(table([f"a process that … (median of {STARTS})", "ms", "MiB after", "MiB at most", "its trial, MiB"], lines))


if __name__ == "__main__":
    main()
