"""What an update costs a device: `make bench-update`, `ARGS=--json` for one JSON object.

Bytes on the wire, requests, fsyncs and bytes written of a first contact, an update, a rollback and an idle poll; the time
of a swap; start-up and memory of an agent that polls and of one that also serves. A small network (5,000 parameters), so
that what is counted is the machinery; the payload's own bytes stand beside.
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

from lrcompress import publish
from lrcompress.cli.output import table
from lrcompress.payload import parse
from lrcompress.runtime import Session
from tests.support.fleet import PASSPHRASE, Fleet, made, served

ROOT = Path(__file__).parents[2]
SWAPS = 200

PROCESS = """
import json, resource, sys, time
started = time.perf_counter()
from lrcompress.edge import Device
device = Device(sys.argv[1])
if sys.argv[2] == "update":
    said = device.update()
    assert said["error"] is None, said
elif sys.argv[2] == "serve":
    device._loaded()
ms = (time.perf_counter() - started) * 1000
print(json.dumps({"ms": ms, "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}))
"""


def process(fleet: Fleet, what: str) -> dict[str, float]:
    """Return start-up and memory of a process that opens the device and polls, loads the model, or does nothing."""
    command = [sys.executable, "-c", PROCESS, str(fleet.at), what]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    said = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    found: dict[str, float] = json.loads(said.stdout)
    return found


def measure(folder: Path) -> dict[str, Any]:
    fleet = Fleet(folder)
    with served(fleet.repo) as url:
        (fleet.at / "device.json").write_text(json.dumps({"schema": 1, "url": url}))
        rows: dict[str, Any] = {}

        def note(what: str, payload_bytes: int) -> None:
            said = fleet.device().update()
            assert said["error"] is None, said
            kept = ("bytes_downloaded", "requests", "fsyncs", "bytes_written", "ms")
            rows[what] = {"payload_bytes": payload_bytes, **{k: said[k] for k in kept}}

        note("first contact, no release", 0)
        note("first update", fleet.add("first")["payload_bytes"])
        note("update", fleet.add("second")["payload_bytes"])
        note("idle poll", 0)
        publish.rollback(fleet.repo, 1, passphrase=PASSPHRASE)
        note("published rollback", 0)
        processes = {what: process(fleet, what) for what in ("open", "update", "serve")}
    session = Session(made() / "exported")
    payloads = [
        parse(fleet.payload(r["sha256"]).read_bytes()) for r in publish.status(fleet.repo)["groups"][0]["releases"]
    ]
    times = []
    for i in range(SWAPS):
        started = time.perf_counter()
        session.swap(payloads[i % len(payloads)])
        times.append((time.perf_counter() - started) * 1000)
    swap = {"n": SWAPS, "median_ms": statistics.median(times), "p99_ms": sorted(times)[int(0.99 * SWAPS)]}
    return {"updates": rows, "swap": swap, "processes": processes}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true")
    as_json = parser.parse_args().json
    with tempfile.TemporaryDirectory(prefix="lrcompress-bench-") as folder:
        found = measure(Path(folder))
    if as_json:
        print(json.dumps(found))
        return
    columns = ["payload_bytes", "bytes_downloaded", "requests", "fsyncs", "bytes_written", "ms"]
    lines = [[name, *(f"{row[c]:.0f}" for c in columns)] for name, row in found["updates"].items()]
    print(table(["", "payload B", "on the wire B", "requests", "fsyncs", "written B", "ms"], lines))
    swap = found["swap"]
    print(f"\nswap, of {swap['n']}: median {swap['median_ms']:.2f} ms, p99 {swap['p99_ms']:.2f} ms")
    for name, row in found["processes"].items():
        print(
            f"a process that does '{name}': {row['ms']:.0f} ms from the interpreter's start, {row['peak_rss_bytes'] / 2**20:.0f} MiB at most"
        )


if __name__ == "__main__":
    main()
