"""Memory and time on layers as large as those of a 7B model: `make bench-stream`.

A checkpoint of 3, 6 and 12 layers (4096×4096, 11008×4096, 4096×11008 in turn, half precision, one shard each) is
written to a temporary folder and factorized by a process of its own. What must hold:

    peak memory above the imports ≤ 2.5 · (weight + Gram + eigenvectors of the largest layer, float64)
    the same peak, within a tenth, at 12 layers as at 3
    processor time that grows as the layers do, within a third

Full and randomized SVD are compared layer by layer at 3 layers. Exits with 1 where a bound is missed.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

ROOT = Path(__file__).resolve().parents[2]
SHAPES = ((4096, 4096), (11008, 4096), (4096, 11008))
NAMES = ("self_attn.o_proj", "mlp.up_proj", "mlp.down_proj")
COUNTS = (3, 6, 12)
CHILD = """
import json, resource, sys
import lrcompress.verbs.factorize, lrcompress.model.opening, lrcompress.work.pools, threadpoolctl
def kib(what):
    return int(next(l for l in open("/proc/self/status") if l.startswith(what)).split()[1])
before = kib("VmRSS")
folder, output, rank, svd, threads = sys.argv[1:]
found = lrcompress.factorize(folder, rank=int(rank), svd=svd, threads=int(threads), output=output).data
used = resource.getrusage(resource.RUSAGE_SELF)
peak = (kib("VmHWM") - before) * 1024
print(json.dumps({"peak_bytes": peak, "cpu_seconds": used.ru_utime + used.ru_stime, "layers": found["layers"]}))
"""


def main() -> int:
    """Print the tables and what was missed, or with --json one object."""
    parser = argparse.ArgumentParser(description="Measure memory and time of streamed factorization.")
    parser.add_argument("--rank", type=int, default=256)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--scale", type=int, default=1, help="divide the shapes by this, to try the benchmark itself")
    parser.add_argument("--folder", type=Path, help="where the temporary checkpoint goes")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    shapes = [(m // options.scale, n // options.scale) for m, n in SHAPES]
    started = time.perf_counter()
    with tempfile.TemporaryDirectory(dir=options.folder, prefix="bench-stream-") as place:
        rows = measure(Path(place), shapes, options.rank, options.threads)
    bound = 2.5 * max(m * n + 2 * min(m, n) ** 2 for m, n in shapes) * 8
    missed = misses(rows, bound)
    result = {"rank": options.rank, "threads": options.threads, "bound_bytes": bound, "rows": rows, "missed": missed,
              "seconds": time.perf_counter() - started}  # fmt: skip
    if options.json:
        print(json.dumps(result))
    else:
        report(result, shapes)
    return 1 if missed else 0


def measure(place: Path, shapes: list[tuple[int, int]], rank: int, threads: int) -> list[dict[str, Any]]:
    """Return one row per run."""
    rows = []
    for count in COUNTS:
        source = place / f"model-{count}"
        write(source, shapes, count)
        for svd in ("full", "randomized") if count == COUNTS[0] else ("randomized",):
            rows.append({"layers": count, "svd": svd, **run(source, place / "out", rank, svd, threads)})
            print(f"{count} layers, {svd}: {rows[-1]['seconds']:.0f} s", file=sys.stderr, flush=True)
            shutil.rmtree(place / "out")
        shutil.rmtree(source)
    return rows


def write(folder: Path, shapes: list[tuple[int, int]], count: int) -> None:
    """Write a checkpoint in shards: weights whose singular values fall as those of trained layers do, over a floor."""
    folder.mkdir()
    weight_map = {}
    for i in range(count):
        m, n = shapes[i % len(shapes)]
        name = f"model.layers.{i // len(shapes)}.{NAMES[i % len(shapes)]}.weight"
        g = torch.Generator().manual_seed(i)
        inner = min(m, n) // 2
        fall = torch.arange(1, inner + 1, dtype=torch.float32) ** -0.5
        w = (torch.randn(m, inner, generator=g) * fall) @ torch.randn(inner, n, generator=g)
        w += 0.5 * torch.randn(m, n, generator=g)
        shard = f"model-{i + 1:05d}-of-{count:05d}.safetensors"
        save_file({name: (w / max(m, n) ** 0.5).half()}, folder / shard)
        weight_map[name] = shard
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def run(source: Path, output: Path, rank: int, svd: str, threads: int) -> dict[str, Any]:
    """Factorize in a process of its own; return what it used and what became of the layers."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(threads)}
    command = [sys.executable, "-c", CHILD, str(source), str(output), str(rank), svd, str(threads)]
    started = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode != 0:
        raise RuntimeError(done.stderr)
    found = json.loads(done.stdout)
    errors = [layer["rel_error"] for layer in found["layers"]]
    return {"peak_bytes": found["peak_bytes"], "cpu_seconds": found["cpu_seconds"], "errors": errors,
            "seconds": time.perf_counter() - started}  # fmt: skip


def misses(rows: list[dict[str, Any]], bound: float) -> list[str]:
    """Return what does not hold, in words."""
    few, many = (
        next(r for r in rows if r["layers"] == n and r["svd"] == "randomized") for n in (COUNTS[0], COUNTS[-1])
    )
    full = next(r for r in rows if r["svd"] == "full")
    out = [
        f"{r['layers']} layers, {r['svd']}: peak {r['peak_bytes'] / 1e6:.0f} MB above {bound / 1e6:.0f} MB"
        for r in rows
        if r["peak_bytes"] > bound
    ]
    if many["peak_bytes"] > 1.1 * few["peak_bytes"]:
        out.append(f"the peak grows from {few['peak_bytes'] / 1e6:.0f} to {many['peak_bytes'] / 1e6:.0f} MB")
    growth, linear = many["cpu_seconds"] / few["cpu_seconds"], many["layers"] / few["layers"]
    if growth > 4 / 3 * linear:
        out.append(f"{linear:.0f} × the layers take {growth:.1f} × the time")
    worst = max(a / b for a, b in zip(few["errors"], full["errors"], strict=True))
    if worst > 1.03:
        out.append(f"the randomized SVD errs {worst:.3f} × as much as the full one")
    return out


def report(result: dict[str, Any], shapes: list[tuple[int, int]]) -> None:
    print(f"rank {result['rank']}, {result['threads']} threads, {result['seconds']:.0f} s in all")
    print(f"{'layers':>6} {'svd':11}{'seconds':>9}{'s/layer':>9}{'cpu s':>8}{'peak MB':>9}{'of bound':>10}")
    for r in result["rows"]:
        share = r["peak_bytes"] / result["bound_bytes"]
        print(
            f"{r['layers']:6d} {r['svd']:11}{r['seconds']:9.1f}{r['seconds'] / r['layers']:9.1f}"
            f"{r['cpu_seconds']:8.1f}{r['peak_bytes'] / 1e6:9.0f}{share:10.0%}"
        )
    print("relative error by shape:")
    first = [r for r in result["rows"] if r["layers"] == COUNTS[0]]
    for i, (m, n) in enumerate(shapes):
        print(f"{m:>6}×{n:<6}" + "".join(f"  {r['svd']} {r['errors'][i]:.4f}" for r in first))
    for line in result["missed"] or ["every bound holds"]:
        print(line)


if __name__ == "__main__":
    sys.exit(main())
