"""One row in a process of its own: compress, export, judge; the result is one JSON object in a file.

    python -m tests.benchmarks.peers.worker --network resnet20 --row balf --kept 0.5 --output row.json

`seconds`, `cpu_seconds` and `peak_rss_bytes` are of the compression alone, calibration included; the peak is above what the process
held when network, data and packages were loaded.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import torch

from .foreign import ready, usable_torchvision


def main() -> int:
    """Run one row and write its numbers."""
    parser = argparse.ArgumentParser(description="Run one row of the comparison.")
    parser.add_argument("--network", required=True)
    parser.add_argument("--row", required=True)
    parser.add_argument("--kept", type=float, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--bn", action="store_true")
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    usable_torchvision()
    with contextlib.redirect_stdout(sys.stderr):  # other packages print
        result = run(options)
    options.output.write_text(json.dumps(result, allow_nan=False))
    return 0


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Return the numbers of one row."""
    from lrcompress.model.surgery import count_parameters

    from .drift import reestimate_norms
    from .networks import open_network
    from .rows import ROWS
    from .runtime import foreign_graph, int4_graph, own_graph, runner

    row, network = ROWS[options.row], open_network(options.network, seed=options.seed, quick=options.quick)
    torch.manual_seed(options.seed)
    for batch in network.batches(8, 8):  # what the first pass allocates is no method's memory
        with torch.no_grad():
            network.opened.outputs(network.module, batch)
    if row.package:
        ready(row.package)
    module, notes, norms = network.module, "", "not asked for"
    started, worked, before = time.perf_counter(), _cpu(), _mark()
    if row.make is not None:
        made = row.make(network, options.kept)
        module, notes = made.module, made.notes
    if options.bn:
        norms = "re-estimated" if reestimate_norms(network, module) else "none left"
    seconds, cpu_seconds, peak = time.perf_counter() - started, _cpu() - worked, _peak() - before
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        if row.name.startswith("int4"):
            graph = int4_graph(network, scratch, tables=row.name == "int4-tables")
        elif row.package:
            graph = foreign_graph(network, module)
        else:
            graph = own_graph(network, module, scratch, "int8" if row.name == "int8" else "none")
    params = count_parameters(module)
    fixed = network.params - network.in_scope
    return {
        "network": network.name, "row": row.name, "label": row.label, "kept": options.kept, "seed": options.seed,
        "bytes": len(graph.SerializeToString()), "params": params, "params_share": params / network.params,
        "scope_share": (params - fixed) / network.in_scope, **network.judge(runner(graph, options.threads)),
        "seconds": seconds if row.make is not None else None,
        "cpu_seconds": cpu_seconds if row.make is not None else None, "peak_rss_bytes": max(peak, 0) if row.make else None,
        "batch_norm": norms, "notes": notes, "calibration_samples": len(network.calibration),
    }  # fmt: skip


def _cpu() -> float:
    """Return the processor seconds of this process and of those it waited for: other work on the machine adds none."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def _mark() -> int:
    """Return the resident bytes of this process and let the kernel measure its peak from here on."""
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def _peak() -> int:
    return _status("VmHWM")


def _status(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"no {key} in /proc/self/status")


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    sys.exit(main())
