"""Accuracy, bytes and milliseconds of every way to make a network small: `make bench-frontier`.

For each network: dense fp32 and what one line of ONNX Runtime's quantizers makes of it, dense and low-rank networks of
lrcompress with fewer bits, and what the planner chooses within the budgets of each of those lines. Batch 1, interleaved
rounds. Says which row is dominated by which, and ends with exit 1 where a choice of the planner is dominated by one line
of ONNX Runtime. Also told: how far predicted times of whole networks are from measured ones on this machine.

    python -m tests.benchmarks.bench_frontier --only resnet20 --threads 1,2 --table table.json

Rows are kept in the output folder: the same command again makes those that are missing, and times all of them anew.
"""

from __future__ import annotations

import argparse
import logging
import sys
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lrcompress.files import write_json
from lrcompress.latency import LatencyTable, machine, profile_device, read_table, write_table
from lrcompress.plan.graph_time import priced, request_operators
from lrcompress.plan.prices import Prices
from lrcompress.validate.pricing import ALLOWED, SPREADS

from .frontier.comparing import broken_promises, dominated, measure, table
from .frontier.rows import ONE_LINE, OURS, PLANNER, Kept, Planner, Row, dense_rows, our_rows
from .frontier.subjects import SUBJECTS, Subject, open_subject
from .peers.runtime import runner


def main() -> int:
    """Run the networks that are asked for; write frontier.json and frontier.txt as they come."""
    options = _options()
    logging.disable(logging.WARNING)  # the quantizers and the exporter tell of every tensor
    options.output.mkdir(parents=True, exist_ok=True)
    prices_at = options.table or options.output / "latency.json"
    if not prices_at.is_file():
        print("measuring operators: leave the machine alone for a few minutes", file=sys.stderr)
        write_table(prices_at, profile_device(threads=options.threads))
    prices = read_table(prices_at)
    differs = prices.differs_from_here()
    if differs:
        print(f"warning: {differs}", file=sys.stderr)
    results: list[dict[str, Any]] = []
    texts, broken = [], []
    for name in options.only:
        subject = open_subject(name, quick=options.quick)
        rows = compare(subject, prices, options)
        broken += [f"{name}: {line}" for line in broken_promises(rows, subject.best)]
        told = predictions(subject, rows, prices)
        texts += [table(name, rows, subject.best), "", _told(told), ""]
        results.append(
            {"network": name, "rows": [r.as_json() for r in rows], "dominated": dominated(rows, subject.best), "predicted": told}
        )  # fmt: skip
        write_json(
            options.output / "frontier.json", {"machine": machine(), "quick": options.quick, "networks": results}
        )
        (options.output / "frontier.txt").write_text("\n".join(texts))
        print("\n".join(texts[-4:]), flush=True)
    errors = [abs(p["error"]) for r in results for p in r["predicted"]]
    if errors:
        spread = max(prices.retest_spread.values())
        print(
            f"whole networks, predicted and measured: median error {np.median(errors):.1%} of {len(errors)}; allowed {max(ALLOWED, SPREADS * spread):.1%}"
        )
    print("\n".join(broken) if broken else "no choice of the planner is dominated by one line of ONNX Runtime")
    return 1 if broken else 0


def compare(subject: Subject, prices: LatencyTable, options: argparse.Namespace) -> list[Row]:
    """Make and judge the rows of one network that are not kept yet, and time all of them."""
    kept = Kept(options.output / subject.name)
    request, threads = subject.request(), min(options.threads)
    rows = [_judged(kept.get(r.name) or r, subject, kept) for r in dense_rows(subject)]
    plain = [r for r in rows if r.graph]
    measure(plain, request, options.threads, 3)  # what the planner is asked to beat
    if OURS in options.groups:
        rows += [_judged(r, subject, kept) for r in our_rows(subject, options.ratio, kept.get)]
    if PLANNER in options.groups:
        planner = Planner(subject, prices, threads)
        for name, n_bytes, ms in budgets(plain, threads, options.budgets.get(subject.name, ())):
            row = kept.get(name) or planner.row(name, n_bytes=n_bytes, ms=ms)
            rows.append(_judged(row, subject, kept))
    measure(rows, request, options.threads, options.rounds)
    return rows


def budgets(plain: list[Row], threads: int, sizes: Sequence[float]) -> Iterator[tuple[str, float, float | None]]:
    """Yield name, bytes and milliseconds of the budgets: those of each line of the runtime, less time, and sizes in MB."""
    for row in plain[1:]:
        yield f"planned as {row.name}", row.n_bytes, row.ms[threads]
        yield f"planned, bytes of {row.name}", row.n_bytes, None
    yield "planned, 0.7 of the dense time", plain[0].n_bytes, 0.7 * plain[0].ms[threads]
    for size in sizes:
        yield f"planned, {size:g} MB", size * 1e6, None


def _judged(row: Row, subject: Subject, kept: Kept) -> Row:
    if row.graph and row.value is None:
        found = subject.judge(runner_of(row))
        row.value, row.stderr, row.n = float(found["value"]), float(found["stderr"]), int(found["n"])
    kept.put(row)
    size = f"{row.n_bytes:,} bytes, {row.value:.4f}" if row.graph and row.value is not None else row.why_not
    print(f"{subject.name}: {row.name}: {size}", file=sys.stderr, flush=True)
    return row


def runner_of(row: Row) -> Any:
    import onnx

    return runner(onnx.ModelProto.FromString(row.graph), 1)


def predictions(subject: Subject, rows: list[Row], prices: LatencyTable) -> list[dict[str, Any]]:
    """Return predicted beside measured times of every row and number of threads."""
    found = []
    request = subject.request()
    for row in rows:
        if not row.graph:
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            run = request_operators(row.graph, request, blocked=prices.blocked)
        for threads, ms in row.ms.items():
            if threads in prices.threads:
                predicted = priced(run, Prices(prices, threads)).ms
                found.append(
                    {
                        "row": row.name,
                        "threads": threads,
                        "predicted_ms": predicted,
                        "measured_ms": ms,
                        "error": predicted / ms - 1,
                    }
                )
    return found


def _told(found: list[dict[str, Any]]) -> str:
    if not found:
        return "no times"
    errors = [abs(f["error"]) for f in found]
    return f"predicted times: median error {np.median(errors):.1%}, largest {max(errors):.1%} of {len(errors)}"


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--only", type=lambda t: t.split(","), default=list(SUBJECTS), help=f"some of {', '.join(SUBJECTS)}"
    )
    parser.add_argument("--threads", type=lambda t: [int(v) for v in t.split(",")], default=[1, 2])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--ratio", type=float, default=0.5, help="share of the numbers in the low-rank rows")
    parser.add_argument(
        "--groups",
        type=lambda t: t.split(","),
        default=[OURS, PLANNER],
        help=f"of {OURS}, {PLANNER}; {ONE_LINE} is always there",
    )
    parser.add_argument(
        "--budget", action="append", default=[], metavar="NETWORK:MB", help="one more budget of bytes for the planner"
    )
    parser.add_argument("--table", type=Path, help="a latency table of this machine; made where there is none")
    parser.add_argument("--quick", action="store_true", help="a tenth of the samples")
    parser.add_argument("--output", type=Path, default=Path(tempfile.gettempdir()) / "bench-frontier")
    options = parser.parse_args()
    options.budgets = {}
    for text in options.budget:
        network, _, size = text.partition(":")
        options.budgets.setdefault(network, []).append(float(size))
    unknown = [n for n in options.only if n not in SUBJECTS]
    if unknown:
        parser.error(f"no network {unknown[0]!r}; there are {', '.join(SUBJECTS)}")
    return options


if __name__ == "__main__":
    sys.exit(main())
