"""The plots of a report, each one SVG text."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Mapping
from typing import Any

INK, MUTED, ACCENT, SECOND = "#1b1f24", "#8a929c", "#1f6feb", "#d1582c"
_MARKS = ("o", "s", "^", "D", "v", "P", "X")
_MANY_LAYERS = 40


def draw(report: Mapping[str, Any]) -> dict[str, str]:
    """Return the plots by name."""
    plots: dict[str, Callable[[Any, Mapping[str, Any]], None]] = {"bytes": _accuracy_over_bytes, "device": _device}
    if any(row["form"] != "dense" for row in report["layers"]):
        plots["layers"] = _layers
    if report["spectra"]:
        plots["spectra"] = _spectra
    sizes = {
        "layers": (8.4, max(2.4, 0.24 * min(len(_layer_rows(report)), _MANY_LAYERS) + 1.2)),
        "device": (8.4, 0.38 * len(report["device_rows"]) + 1.1),
    }
    return {name: _svg(plot, report, sizes.get(name, (8.4, 4.0))) for name, plot in plots.items()}


def _svg(plot: Callable[[Any, Mapping[str, Any]], None], report: Mapping[str, Any], inches: tuple[float, float]) -> str:
    import matplotlib
    from matplotlib.figure import Figure

    style = {
        "svg.hashsalt": "lrcompress",
        "svg.fonttype": "none",
        "font.family": "sans-serif",
        "font.size": 10,
        "axes.edgecolor": MUTED,
        "axes.labelcolor": INK,
        "text.color": INK,
        "xtick.color": INK,
        "ytick.color": INK,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "grid.color": "#e3e6ea",
        "axes.axisbelow": True,
        "legend.frameon": False,
    }
    with matplotlib.rc_context(style):
        figure = Figure(figsize=inches, layout="constrained")
        plot(figure.subplots(), report)
        out = io.StringIO()
        figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None})
    text = out.getvalue()
    # The block of metadata names web addresses and says nothing; the page is to need none.
    return re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)


def _scale(metric: str) -> tuple[float, str]:
    return (100.0, " (%)") if metric in ("accuracy", "top5") else (1.0, "")


def _accuracy_over_bytes(axes: Any, report: Mapping[str, Any]) -> None:
    factor, unit = _scale(report["metric"]["name"])
    low, high = min(r["bytes"] for r in report["rows"]), max(r["bytes"] for r in report["rows"])
    per, name = (1e6, "MB") if low > 5e6 else (1e3, "kB")
    for i, row in enumerate(report["rows"]):
        color = INK if row["name"] == "original fp32" else SECOND if "int8" in row["name"] else ACCENT
        # Equal bytes lies, by its making, just beside the adapter: a hollow mark around it keeps both in sight.
        hollow = "equal bytes" in row["name"]
        axes.errorbar(
            row["bytes"] / per,
            factor * row["value"],
            yerr=factor * row["stderr"],
            fmt=_MARKS[i % len(_MARKS)],
            color=color,
            capsize=3,
            markersize=13 if hollow else 7,
            markerfacecolor="none" if hollow else color,
            label=row["name"],
        )
    axes.set_xscale("log")
    axes.set_xlabel(f"{name} on disk (log scale)")
    axes.set_ylabel(f"{report['metric']['name']}{unit}, ± 1 standard error")
    axes.set_xlim(low / per * 0.85, high / per * 1.15)
    steps = (1, 2, 5) if high > 8 * low else (1, 1.5, 2, 3, 4, 5, 6, 8)
    ticks = [t for t in (m * 10.0**e for e in range(-1, 7) for m in steps) if 0.85 * low <= per * t <= 1.15 * high]
    axes.set_xticks(ticks, [f"{t:,.0f}" if t >= 1 else f"{t:g}" for t in ticks])
    axes.minorticks_off()
    axes.grid(True)
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), fontsize=9)


def _device(axes: Any, report: Mapping[str, Any]) -> None:
    factor, unit = _scale(report["metric"]["name"])
    rows = list(reversed(report["device_rows"]))
    for i, row in enumerate(rows):
        shifted = row["split"] != "test"
        number = factor * row["value"]
        axes.barh(
            i,
            number,
            xerr=factor * row["stderr"],
            color=SECOND if shifted else ACCENT,
            height=0.62,
            capsize=3,
            ecolor=INK,
        )
        axes.text(
            factor * 0.01 if factor > 1 else 0.01,
            i,
            f"{number:.1f}" if factor > 1 else f"{number:.3f}",
            va="center",
            color="white",
            fontweight="bold",
        )
    names = [r["name"] + (f", on {r['split'].rpartition('.')[0]} data" if r["split"] != "test" else "") for r in rows]
    axes.set_yticks(range(len(rows)), names)
    axes.set_xlabel(f"{report['metric']['name']}{unit}, from the device's own answers")
    axes.set_xlim(0, factor * 1.02)
    axes.grid(True, axis="x")


def _layer_rows(report: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    rows = [r for r in report["layers"] if r["params_before"] > 1]
    return sorted(rows, key=lambda r: -r["params_before"])[:_MANY_LAYERS] if len(rows) > _MANY_LAYERS else rows


def _layers(axes: Any, report: Mapping[str, Any]) -> None:
    rows = list(reversed(_layer_rows(report)))
    y = range(len(rows))
    axes.barh(y, [r["params_before"] / 1000 for r in rows], color="#d5dae1", height=0.74, label="before")
    axes.barh(y, [r["params_after"] / 1000 for r in rows], color=ACCENT, height=0.42, label="after")
    # A table of embeddings that nobody touched must not press all other bars flat.
    most = max(r["params_before"] for r in rows if r["form"] != "dense") / 1000
    for i, r in enumerate(rows):
        width = max(r["params_before"], r["params_after"]) / 1000
        error = "dense" if r["form"] == "dense" else f"{r['form']}, error {r['rel_error']:.2f}"
        if width > 1.3 * most:
            inside = f"dense, {width:,.0f} thousand: goes on to the right"
            axes.text(1.28 * most, i, inside, va="center", ha="right", fontsize=8, color="white", fontweight="bold")
            axes.barh(i, 1.3 * most, color=ACCENT, height=0.74)
        else:
            axes.text(width + 0.01 * most, i, error, va="center", fontsize=8, color=MUTED)
    axes.set_yticks(y, [r["name"] for r in rows], fontsize=8)
    axes.set_xlim(0, 1.3 * most)
    axes.set_ylim(-0.7, len(rows) - 0.3)
    axes.set_xlabel("thousand parameters")
    axes.grid(True, axis="x")
    axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=2)


def _spectra(axes: Any, report: Mapping[str, Any]) -> None:
    from matplotlib import colormaps

    forms = {r["name"]: (r["form"], r["rank"]) for r in report["layers"]}
    names = [r["name"] for r in report["layers"] if r["name"] in report["spectra"]]
    few = len(names) <= 8
    shades = colormaps["viridis"].resampled(max(2, len(names)))
    for i, name in enumerate(names):
        values = report["spectra"][name]
        # Many layers are told apart by their depth only: the legend names the first and the last.
        color, shown = (
            (f"C{i}", name) if few else (shades(0.9 * i / len(names)), name if i in (0, len(names) - 1) else None)
        )
        x = [(k + 1) / len(values) for k in range(len(values))]
        axes.plot(x, values, color=color, lw=1.6 if few else 0.9, alpha=1 if few else 0.7, label=shown)
        form, rank = forms.get(name, ("dense", None))
        # Only an SVD keeps a number of just these values; other forms cut other matrices.
        if form == "svd" and isinstance(rank, int) and 1 <= rank <= len(values):
            axes.plot(x[rank - 1], values[rank - 1], "o", color=color, markersize=6 if few else 4)
    low = min(v for values in report["spectra"].values() for v in values)
    axes.set_yscale("log")
    axes.set_ylim(max(1e-4, 0.6 * low), 1.3)
    dots = any(forms.get(n, ("", None))[0] == "svd" for n in names)
    axes.set_xlabel("share of the singular values" + (" (a dot: the rank that an SVD kept)" if dots else ""))
    axes.set_ylabel("singular value over the largest")
    axes.grid(True)
    if few:
        axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), fontsize=9)
    else:
        axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=2, fontsize=9)
