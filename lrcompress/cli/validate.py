"""`lrcompress validate`."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import click

from ..errors import LrcompressWarning, ParityError
from .options import arch_arguments, model_options, online_option
from .output import Result, Shell, common, human_bytes, table


@click.command(epilog="Example: lrcompress validate exported --on cpu --on arm64:cortex-a53 --on ssh://pi@board.local")
@click.argument("exported", default="exported", type=click.Path())
@click.option("--data", metavar="DATA", help="Labelled samples to measure on; needs --metric.")
@click.option("--metric", metavar="NAME", help="accuracy, top5, spearman, nll, perplexity, mse, cosine_to_original, …")
@click.option("--original", type=click.Path(), help="The model that was factorized, if it moved.")
@click.option(
    "--max-drop", type=click.FloatRange(min=0), help="Largest drop  [default: 0.01; where less is better, 1 %]"
)
@click.option(
    "--on",
    multiple=True,
    default=("cpu",),
    show_default=True,
    metavar="TARGET",
    help="cpu, arm64:CPU (emulated: numbers, never speed), or ssh://USER@HOST[:PORT].",
)
@click.option("--threads", type=click.IntRange(min=1), default=1, show_default=True, help="Threads of the runtime.")
@click.option(
    "--latency",
    metavar="FILE|DEVICE",
    help="A table of 'device profile', or a device that has one: predicted beside measured.",
)
@model_options
@online_option
@common
def validate(
    shell: Shell, exported: str, data: str | None, on: tuple[str, ...], threads: int, **options: Any
) -> Result:
    """Check the exported model EXPORTED against its golden outputs, and with --data what it is worth.

    Exit 5 if an answer is further away than the manifest allows, or if the metric drops too far. An emulated processor
    checks numbers and size, and says nothing about time. ssh uses the keys and settings it has, and asks nothing;
    ?python=PATH names the Python there that has onnxruntime, if it is not python3.
    """
    if data is None:
        d = _bare(exported, on, threads, options, shell)
    else:
        from ..model import parse_input
        from ..verbs.validate import validate as verb

        options["inputs"] = tuple(parse_input(i) for i in options["inputs"])
        options["arch_args"] = arch_arguments(options["arch_args"])
        d = verb(exported, data=data, on=on, threads=threads, progress=shell.progress, **options).data
    text = describe(d)
    if d["passed"]:
        return Result(d, text=text)
    error = ParityError(exported, "answers within tolerance", d["misses"][0], "export it again, or compress it less")
    return Result({**d, "error": error.as_dict()}, text=text, exit_code=error.exit_code)


def _bare(exported: str, on: tuple[str, ...], threads: int, options: dict[str, Any], shell: Shell) -> dict[str, Any]:
    """Check goldens only: needs neither the original model nor what opens it."""
    from ..validate import validate as check

    if options["original"] is not None:
        note = "--original is used with --data; the distance to it comes from the golden set"
        warnings.warn(note, LrcompressWarning, stacklevel=2)
    given = {k: options[k] for k in ("metric", "max_drop")}
    if options["latency"] is not None:
        from ..plan.profile import named_table

        given["latency"] = named_table(options["latency"])
    return check(Path(exported), on=on, threads=threads, progress=shell.progress, **given).data


def describe(d: dict[str, Any]) -> str:
    """Return the report as a person reads it."""
    rows = [r for t in d["targets"] for r in _rows(t)]
    header = ["target", "against", "output", "max |diff|", "allowed", "p50 ms", "p95 ms", "bytes", ""]
    metrics = [_metric(t["metric"]) for t in d["targets"] if t["metric"]]
    metrics += [_latency(t["latency"]) for t in d["targets"] if t["latency"]]
    end = ["passed"] if d["passed"] else ["missed:", *(f"  {line}" for line in d["misses"])]
    return "\n".join([table(header, rows, left=3), *metrics, *end])


def _rows(t: dict[str, Any]) -> list[list[str]]:
    """Return the lines of one comparison, and of the distance to the original where that is known."""
    found = [
        [
            t["target"], t["against"], o["name"], _number(o["max_abs_diff"], ".2e"), _number(o["tolerance"], ".2e"),
            _number(t["p50_ms"], ".3f"), _number(t["p95_ms"], ".3f"), human_bytes(t["bytes"]), _verdict(o),
        ]
        for o in t["outputs"]
    ]  # fmt: skip
    for o in (t["original"] or {"outputs": []})["outputs"]:
        found.append(
            [t["target"], "original", o["name"], _number(o["max_abs_diff"], ".2e"), *["–"] * 3, "", "reported"]
        )
    return found


def _latency(m: dict[str, Any]) -> str:
    threads = f"{m['threads']} thread{'s' * (m['threads'] > 1)}"
    told = f"one request at {threads}: predicted {m['predicted_ms']:.3f} ms, measured {m['measured_ms']:.3f} ms, {m['error']:+.1%}"
    verdict = "within" if m["within"] else "beyond"
    told += f" ({verdict} {m['allowed']:.0%}; repeated measurements differ by {m['retest_spread']:.1%})"
    largest = ", ".join(f"{name} {ms:.3f}" for name, ms in list(m["parts"].items())[:4])
    lacking = f"; not in the table: {', '.join(m['not_measured'])}" if m["not_measured"] else ""
    return f"{told}: {largest}{lacking}"


def _number(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)


def _verdict(output: dict[str, Any]) -> str:
    return "ok" if output["passed"] else "MISS"


def _metric(m: dict[str, Any]) -> str:
    found = f"{m['name']} {m['value']:.4f} ± {m['stderr']:.4f} (n = {m['n']})"
    if m["original"] is None:
        return f"{found}; not compared"
    drop = f"drop {m['drop']:.4f} ± {m['drop_stderr']:.4f}, allowed {m['max_drop']:.4f} + 2 standard errors"
    return f"{found}; original {m['original']:.4f}, {drop}: {'ok' if m['passed'] else 'MISS'}"
