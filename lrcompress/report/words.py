"""The report as text: the table that a run ends with, and what stands below it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def size(n: float) -> str:
    """Return bytes in decimal units."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if abs(n) < 1000 or unit == "TB":
            return f"{n:.0f} {unit}" if unit == "B" else f"{n:.1f} {unit}"
        n /= 1000
    raise AssertionError


def value(metric: str, number: float, stderr: float) -> str:
    """Return a value with its standard error: shares in per cent."""
    if metric in ("accuracy", "top5"):
        return f"{100 * number:.1f} ± {100 * stderr:.1f} %"
    return f"{number:.4f} ± {stderr:.4f}"


def rows_of(report: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Return header and cells of the main table."""
    n = report["rows"][0]["n"]
    header = ["model", "bytes on disk", f"{report['metric']['name']} (n = {n}, ± s.e.)", "p50 ms", "p95 ms"]
    cells = [
        [
            r["name"],
            f"{r['bytes']:,}",
            value(r["metric"], r["value"], r["stderr"]),
            f"{r['p50_ms']:.3f}",
            f"{r['p95_ms']:.3f}",
        ]
        for r in report["rows"]
    ]
    return header, cells


def device_rows_of(report: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Return header and cells of what the device itself answered."""
    header = ["the device's own answers", "data", f"{report['metric']['name']} (± s.e.)", "n"]
    return header, [
        [r["name"], split_words(r["split"]), value(r["metric"], r["value"], r["stderr"]), str(r["n"])]
        for r in report["device_rows"]
    ]


def updates_of(report: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Return header and cells of the updates over the air."""
    header = [
        "update over the air",
        "payload",
        "with metadata",
        "share of model",
        f"fleet of {report['fleet']['devices']:,}",
    ]
    cells = []
    for release, total in zip(report["updates"], report["fleet"]["updates_bytes"], strict=True):
        sent = wire(release)
        share = f"{100 * sent / report['model_bytes']:.1f} %"
        cells.append(
            [f"{release['seq']} {release['name']}", f"{release['payload_bytes']:,}", f"{sent:,}", share, size(total)]
        )
    cells.append(["the whole model", "", f"{report['model_bytes']:,}", "100.0 %", size(report["fleet"]["model_bytes"])])
    return header, cells


def shifts_of(report: Mapping[str, Any]) -> list[str]:
    """Return a sentence per later update: what the changed world did, and what the update did about it."""
    about = {u["name"]: u for u in report["updates"]}
    original = next(r for r in report["rows"] if r["name"] == "original fp32")
    metric = report["metric"]["name"]
    sentences = []
    for s in report["shifts"]:
        update = about[s["name"]]
        sentences.append(
            f"{s['name']}: {update['about']}. The original fp32 falls from {plain(metric, original['value'])} to "
            f"{plain(metric, s['original'])} there, the device to {plain(metric, s['before'])}; after an update of "
            f"{size(wire(update))} the device answers {plain(metric, s['after'])}, and {plain(metric, s['kept'])} on the "
            "data as they were."
        )
    return sentences


def wire(update: Mapping[str, Any]) -> int:
    """Return what one device downloads for an update."""
    return int(update["bytes_downloaded"] or update["payload_bytes"] + update["metadata_bytes"])


def plain(metric: str, number: float) -> str:
    """Return a value without its standard error."""
    return f"{100 * number:.1f} %" if metric in ("accuracy", "top5") else f"{number:.4f}"


def split_words(split: str) -> str:
    """Name a split for a reader: `test` is unshifted, `rotated.test` is the test set of that change."""
    change, dot, _ = split.rpartition(".")
    return f"test, {change}" if dot else "test"


def aligned(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return aligned text, first column to the left."""
    lines = [list(header), *map(list, rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    text = [
        "  ".join(
            c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    ]
    return "\n".join([text[0], "  ".join("─" * w for w in widths), *text[1:]])


def table_text(report: Mapping[str, Any]) -> str:
    """Return everything a run prints at its end."""
    parts = [report["about"]] if report["about"] else []
    parts += [aligned(*rows_of(report)), aligned(*device_rows_of(report)), aligned(*updates_of(report))]
    parts += [f"why updates exist: {s}" for s in shifts_of(report)]
    training = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in report["training_seconds"].items())
    parts.append(f"training: {training}; all stages {report['seconds']:.0f} s")
    parts.append(f"verdict: {report['verdict']}")
    return "\n\n".join(parts)
