"""Every method in one run, same checkpoint, calibration data and evaluation: `make bench-peers`.

Each row compresses in a process of its own, is exported to one ONNX file and judged in ONNX Runtime; nothing is trained.
Rows of foreign packages run with the interpreter of .venv-peers. Written to --output: peers.json (every run, machine,
versions), peers.txt (the table) and peers.png (metric against bytes).

    python -m tests.benchmarks.bench_peers --only resnet20 --rows svd,balf,lrcompress --kept 0.5 --seeds 0,1,2
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lrcompress.errors import CommandError, LrcompressError
from lrcompress.files import write_json

from .peers import table
from .peers.networks import PROFILES, ROOT
from .peers.rows import ROWS, Row

JSON, TEXT, PLOT = "peers.json", "peers.txt", "peers.png"
_PEERS = ROOT / ".venv-peers" / "bin" / "python"
#: One row never takes longer than this; AIMET's search is the longest.
_MOST_SECONDS = 3600
#: Rows measured under different ones do not stand in one table.
_SETTINGS = ("threads", "quick", "bn")


def main() -> int:
    """Run the rows, write the files as they come, print the table."""
    options = _options()
    earlier = _earlier(options)
    results: list[dict[str, Any]] = []
    lines: list[dict[str, Any]] = []
    for network, row, kept, seed in _runs(options):
        started = time.perf_counter()
        result = earlier.get((network, row.name, kept, seed)) or _run(network, row, kept, seed, options)
        results.append(result)
        seconds = time.perf_counter() - started
        told = (
            f"not run: {result['error']}" if "error" in result else f"{result['value']:.4f}, {result['bytes']:,} bytes"
        )
        print(f"{network} {row.name} kept {kept} seed {seed}: {told} ({seconds:.0f} s)", file=sys.stderr, flush=True)
        lines = _write(options, results)
    if any("error" not in line for line in lines):
        table.plot(lines, options.output / PLOT)
    print((options.output / TEXT).read_text(), end="")
    failed = [r for r in results if "error" in r]
    return 1 if any(options.strict or not ROWS[r["row"]].package for r in failed) else 0


def _write(options: argparse.Namespace, results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Write what there is: a run that is killed keeps its rows."""
    lines = table.summary(results)
    options.output.mkdir(parents=True, exist_ok=True)
    about = {"machine": _machine(options.threads), "versions": _versions(), "options": _told(options)}
    write_json(options.output / JSON, {**about, "summary": lines, "runs": results})
    (options.output / TEXT).write_text(f"{table.text(lines)}\n\n{_fine_print(options)}\n")
    return lines


def _earlier(options: argparse.Namespace) -> dict[tuple[str, str, float, int], dict[str, Any]]:
    """Return the rows that --continue finds; `CommandError` where they were measured under other settings."""
    path = options.output / JSON
    if not options.go_on or not path.is_file():
        return {}
    found = json.loads(path.read_text())
    then, now = ({k: told[k] for k in _SETTINGS} for told in (found["options"], _told(options)))
    if then != now or found["versions"] != _versions():
        raise CommandError(
            f"bench-peers --continue: {path}", f"the settings {now}", f"{then}", "run without --continue"
        )
    return {(r["network"], r["row"], r["kept"], r["seed"]): r for r in found["runs"] if "error" not in r}


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Compare methods of compression at equal data and by file bytes.")
    parser.add_argument("--only", type=_names(PROFILES), default=list(PROFILES), help="networks, separated by commas")
    parser.add_argument("--rows", type=_names(ROWS), default=list(ROWS), help=f"of {','.join(ROWS)}")
    parser.add_argument("--kept", type=lambda t: [float(k) for k in t.split(",")], help="shares of parameters to keep")
    parser.add_argument("--seeds", type=lambda t: [int(s) for s in t.split(",")], default=[0], help="calibration draws")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="small calibration and test data: numbers mean nothing")
    parser.add_argument("--bn", action="store_true", help="re-estimate batch-norm in every row (default: in none)")
    parser.add_argument("--strict", action="store_true", help="fail where a foreign package could not run")
    parser.add_argument("--continue", action="store_true", dest="go_on", help="keep the rows that --output has already")
    parser.add_argument("--output", type=Path, default=ROOT / "build" / "bench-peers")
    return parser.parse_args()


def _names(known: Any) -> Any:
    def parse(text: str) -> list[str]:
        names = text.split(",")
        unknown = [n for n in names if n not in known]
        if unknown:
            raise argparse.ArgumentTypeError(f"expected some of {', '.join(known)}, got {unknown[0]!r}")
        return names

    return parse


def _runs(options: argparse.Namespace) -> Iterator[tuple[str, Row, float, int]]:
    """Yield what to run: a row that no seed or no share changes runs once."""
    for network in options.only:
        shares = options.kept or PROFILES[network].kept
        for row in (ROWS[n] for n in options.rows if network in ROWS[n].networks):
            for kept in shares if row.budgeted else shares[:1]:
                for seed in options.seeds if row.calibrated else options.seeds[:1]:
                    yield network, row, kept, seed


def _run(network: str, row: Row, kept: float, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """Return the numbers of one row, or why there are none."""
    place = {"network": network, "row": row.name, "label": row.label, "kept": kept, "seed": seed}
    shape = {"budgeted": row.budgeted, "partial": not PROFILES[network].whole}
    python = str(_PEERS) if row.package else sys.executable
    if row.package and not _PEERS.is_file():
        return {**place, **shape, "error": "no .venv-peers here; 'make bench-peers' builds it"}
    threads = str(options.threads)
    environment = {
        **os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads,
        "TOKENIZERS_PARALLELISM": "false",
        # Threads that spin while they wait make a row ten times slower where the machine has other work.
        "OMP_WAIT_POLICY": "PASSIVE",
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "row.json"
        command = [
            python, "-m", "tests.benchmarks.peers.worker", "--network", network, "--row", row.name, "--kept", str(kept),
            "--seed", str(seed), "--threads", threads, "--output", str(output),
            *(["--quick"] if options.quick else []), *(["--bn"] if options.bn else []),
        ]  # fmt: skip
        try:
            done = subprocess.run(
                command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=_MOST_SECONDS, check=False
            )
        except subprocess.TimeoutExpired:
            return {**place, **shape, "error": f"it took more than {_MOST_SECONDS} s"}
        if done.returncode or not output.is_file():
            last = [line for line in done.stderr.splitlines() if line.strip()][-1:] or [f"exit {done.returncode}"]
            return {**place, **shape, "error": last[0].strip()[:300]}
        return {**shape, **json.loads(output.read_text())}


def _fine_print(options: argparse.Namespace) -> str:
    norms = "re-estimated in every row that still has one" if options.bn else "re-estimated in no row"
    return "\n".join(
        [
            f"Calibration draws {options.seeds}; batch-norm statistics {norms}; no training; {options.threads} threads.",
            "params: share of the network's numbers (of the encoder's linear weights for minilm). file: one ONNX file, constants",
            "included, judged in ONNX Runtime. ±: binomial, or a bootstrap for spearman; spread: deviation over the draws.",
            "seconds, CPU s, peak: compression with its calibration, above what the process held before; not export or",
            "judging. × BALF: ratio of CPU seconds, which other work on the machine does not change.",
            *(["--quick: small data, these numbers mean nothing."] if options.quick else []),
        ]
    )


def _machine(threads: int) -> dict[str, Any]:
    models = [n for n in Path("/proc/cpuinfo").read_text().splitlines() if n.startswith("model name")]
    memory = next(n for n in Path("/proc/meminfo").read_text().splitlines() if n.startswith("MemTotal"))
    return {
        "system": platform.platform(), "python": platform.python_version(), "cores": os.cpu_count(), "threads": threads,
        "cpu": models[0].partition(":")[2].strip() if models else platform.processor(),
        "memory_bytes": int(memory.split()[1]) * 1024,
    }  # fmt: skip


def _versions() -> dict[str, str]:
    return {p: importlib.metadata.version(p) for p in ("torch", "onnx", "onnxruntime", "numpy", "scipy", "tensorly")}


def _told(options: argparse.Namespace) -> dict[str, Any]:
    return {k: v for k, v in vars(options).items() if k != "output"}


if __name__ == "__main__":
    try:
        sys.exit(main())
    except LrcompressError as e:
        print(e, file=sys.stderr)
        sys.exit(e.exit_code)
