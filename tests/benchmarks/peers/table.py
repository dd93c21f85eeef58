"""The comparison as aligned text and as a picture: means over calibration draws, with their spread."""

from __future__ import annotations

import statistics as stats
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .rows import AIMET, BALF, OURS

Result = dict[str, Any]
_HEAD = (
    f"{'row':27}{'kept':>6}{'params':>8}{'file MB':>9}  {'metric ± stderr':17}{'spread':>8}{'cosine':>8}"
    f"{'seconds':>9}{'CPU s':>8}{'× BALF':>8}{'peak MB':>9}  notes"
)


def summary(results: Sequence[Result]) -> list[Result]:
    """Return one line per network, row and share kept: means over the seeds, `spread` the deviation of the metric."""
    groups: dict[tuple[Any, ...], list[Result]] = {}
    for r in results:
        groups.setdefault((r["network"], r["kept"] if r["budgeted"] else None, r["row"]), []).append(r)
    lines = []
    for group in groups.values():
        good = [r for r in group if "error" not in r]
        if not good:
            lines.append(group[0])
            continue
        line = dict(good[0])
        for key in (
            "value",
            "stderr",
            "bytes",
            "params_share",
            "scope_share",
            "seconds",
            "cpu_seconds",
            "peak_rss_bytes",
            "cosine",
        ):
            values = [r[key] for r in good if r.get(key) is not None]
            line[key] = stats.fmean(values) if values else None
        line["spread"] = stats.stdev([r["value"] for r in good]) if len(good) > 1 else None
        line["seeds"] = [r["seed"] for r in good]
        lines.append(line)
    for line in lines:
        line["times_balf"] = _times(line, lines, BALF)
    return lines


def _times(line: Result, lines: Sequence[Result], row: str, key: str = "cpu_seconds") -> float | None:
    other = next((n for n in lines if n["row"] == row and _same_place(n, line)), None)
    if other is None or not other.get(key) or not line.get(key):
        return None
    return float(line[key] / other[key])


def _same_place(a: Result, b: Result) -> bool:
    return bool(a["network"] == b["network"] and a["kept"] == b["kept"])


def text(lines: Sequence[Result]) -> str:
    """Return the aligned table, a block per network, and how our time compares."""
    out = []
    for network in dict.fromkeys(line["network"] for line in lines):
        own = [line for line in lines if line["network"] == network]
        metric = next((n["metric"] for n in own if "metric" in n), "")
        out += ["", f"{network}: {metric}", _HEAD, *(_line(n) for n in own)]
        for ours in (n for n in own if n["row"] == OURS and "error" not in n):
            for name in (BALF, AIMET):
                cpu, clock = _times(ours, own, name), _times(ours, own, name, "seconds")
                if cpu is not None and clock is not None:
                    out.append(
                        f"{OURS} at {ours['kept']} takes {cpu:.2f} × the CPU seconds of {name}, {clock:.2f} × by the clock"
                    )
    return "\n".join(out[1:])


def _line(r: Result) -> str:
    kept = f"{r['kept']:.2f}" if r["budgeted"] else "–"
    if "error" in r:
        return f"{r['label']:27}{kept:>6}  not run: {r['error']}"
    value = f"{r['value']:.4f} ± {r['stderr']:.4f}"
    cells = [
        f"{r['label']:27}{kept:>6}{r['scope_share' if r['partial'] else 'params_share']:8.3f}{r['bytes'] / 1e6:9.3f}",
        f"  {value:17}{_number(r.get('spread'), 8, 4)}{_number(r.get('cosine'), 8, 3)}{_number(r['seconds'], 9, 1)}"
        f"{_number(r['cpu_seconds'], 8, 1)}",
        f"{_number(r['times_balf'], 8, 2)}{_number(r['peak_rss_bytes'], 9, 0, 1e6)}  {r['notes']}",
    ]
    return "".join(cells).rstrip()


def _number(value: float | None, width: int, digits: int, unit: float = 1.0) -> str:
    return f"{'':>{width}}" if value is None else f"{value / unit:{width}.{digits}f}"


def plot(lines: Sequence[Result], path: Path) -> None:
    """Draw the metric against bytes, a panel per network; the dense rows are marked and int8 has a guide line."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib import ticker

    good = [n for n in lines if "error" not in n]
    networks = list(dict.fromkeys(n["network"] for n in good))
    figure, axes = plt.subplots(1, len(networks), figsize=(7.5 * len(networks), 6.5), squeeze=False)
    names = list(dict.fromkeys(n["row"] for n in good))
    colours = {name: plt.get_cmap("tab20")(i % 20) for i, name in enumerate(names)}
    for axis, network in zip(axes[0], networks, strict=True):
        for row in names:
            points = sorted((n for n in good if n["network"] == network and n["row"] == row), key=lambda n: n["bytes"])
            if points:
                _series(axis, points, colours[row])
        int8 = next((n for n in good if n["network"] == network and n["row"] == "int8"), None)
        if int8 is not None:
            axis.axvline(int8["bytes"] / 1e6, color="0.6", linewidth=0.8, linestyle=":", zorder=0)
            axis.axhline(int8["value"], color="0.6", linewidth=0.8, linestyle=":", zorder=0)
            axis.annotate(
                "dense int8", (int8["bytes"] / 1e6, 0.02), xytext=(3, 0), xycoords=("data", "axes fraction"),
                textcoords="offset points", rotation=90, fontsize=8, color="0.4",
            )  # fmt: skip
        axis.set_xscale("log")
        sizes = [n["bytes"] / 1e6 for n in good if n["network"] == network]
        axis.set_xlim(min(sizes) / 1.15, max(sizes) * 1.15)
        axis.xaxis.set_major_locator(ticker.LogLocator(subs=(1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0)))
        axis.xaxis.set_major_formatter(ticker.FuncFormatter(lambda x, _: f"{x:g}"))
        axis.xaxis.set_minor_formatter(ticker.NullFormatter())
        axis.set_xlabel("ONNX file, MB (log)")
        axis.set_ylabel(next(n["metric"] for n in good if n["network"] == network) + " on held-out data")
        axis.set_title(f"{network}: no training")
        axis.grid(alpha=0.25)
        axis.legend(fontsize=7, ncols=4, loc="upper center", bbox_to_anchor=(0.5, -0.12), frameon=False)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _series(axis: Any, points: Sequence[Result], colour: Any) -> None:
    dense, ours = not points[0]["budgeted"], points[0]["row"] == OURS
    axis.errorbar(
        [n["bytes"] / 1e6 for n in points], [n["value"] for n in points], yerr=[n["stderr"] for n in points],
        color="black" if ours else colour, marker="*" if ours else ("s" if dense else "o"), markersize=11 if ours else 6,
        linewidth=1.6 if ours else 0.9, linestyle="-", capsize=2, label=points[0]["label"],
    )  # fmt: skip
