"""The plots of an inspection, as files: each one PNG and SVG, readable by those who do not see red and green.

for name, content in draw(found, share=0.5).items():
    (folder / name).write_bytes(content)
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence
from typing import Any

from ..factorize import form
from .layers import ENERGIES, Found, svd_of

INK, MUTED, FAINT = "#1b1f24", "#6b7480", "#e3e6ea"
#: Two of the Okabe–Ito colours: told apart by everyone, and in grey by their lightness.
PLAIN, DATA = "#0072B2", "#E69F00"
_STYLE = {
    "svg.hashsalt": "lrcompress", "svg.fonttype": "none", "font.family": "sans-serif", "font.size": 10, "axes.edgecolor": MUTED,
    "axes.labelcolor": INK, "text.color": INK, "xtick.color": INK, "ytick.color": INK, "axes.spines.top": False,
    "axes.spines.right": False, "grid.color": FAINT, "axes.axisbelow": True, "legend.frameon": False, "axes.titlesize": 10,
}  # fmt: skip
_MOST_PANELS, _MOST_ROWS = 30, 60
#: Singular values below this share of the largest are left to the floor of the plot.
_FLOOR = 1e-4


def draw(found: Sequence[Found], *, share: float) -> dict[str, bytes]:
    """Return the plots by file name: spectra, energy, and (where forms were compared) forms, each as .png and .svg."""
    seen = [f for f in found if f.plain is not None and f.plain.energy > 0 and len(f.plain.squares) > 1]
    plots: dict[str, Callable[[Any], None]] = {}
    if seen:
        plots["spectra"] = lambda figure: _spectra(figure, seen)
        plots["energy"] = lambda figure: _energy(figure, seen)
    if any(f.candidates for f in found):
        plots["forms"] = lambda figure: _forms(figure, found, share)
    return {name: content for key, plot in plots.items() for name, content in _files(key, plot).items()}


def _files(name: str, plot: Callable[[Any], None]) -> dict[str, bytes]:
    import matplotlib
    from matplotlib.figure import Figure

    out = {}
    with matplotlib.rc_context(_STYLE):
        figure = Figure(layout="constrained")
        plot(figure)
        for kind, options in (
            ("png", {"dpi": 130, "metadata": {"Software": None}}),
            ("svg", {"metadata": {"Date": None, "Creator": None}}),
        ):
            buffer = io.BytesIO()
            figure.savefig(buffer, format=kind, facecolor="white", **options)
            out[f"{name}.{kind}"] = buffer.getvalue()
    return out


def _largest(found: Sequence[Found], most: int) -> tuple[list[Found], str]:
    """Return at most `most` layers, the largest, in the model's order, and a note if some are missing."""
    if len(found) <= most:
        return list(found), ""
    kept = sorted(range(len(found)), key=lambda i: (-found[i].layer.weight.numel(), i))[:most]
    return [found[i] for i in sorted(kept)], f" (the {most} largest of {len(found)} layers)"


def _short(name: str, limit: int) -> str:
    """Return the end of a dotted path, from a dot on where that fits."""
    if len(name) <= limit:
        return name
    end = name[1 - limit :]
    return "…" + (end[end.index(".") + 1 :] if "." in end[: limit // 2] else end)


def _two_digits(error: float) -> str:
    return "< .01" if 0 < error < 0.005 else f"{error:.2f}"


def _spectra(figure: Any, found: Sequence[Found]) -> None:
    """Small multiples: one panel per layer, plain against weighted, all on the same axes."""
    layers, note = _largest(found, _MOST_PANELS)
    columns = min(5, math.ceil(math.sqrt(1.6 * len(layers))))
    rows = math.ceil(len(layers) / columns)
    figure.set_size_inches(max(5.0, 2.3 * columns), 1.75 * rows + 1.2)
    grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    handles: dict[str, Any] = {}
    smallest = min(v for f in layers for s in (f.plain, f.weighted) if s is not None for v in s.relative)
    floor = max(_FLOOR, 10.0 ** math.floor(math.log10(max(smallest, _FLOOR))))
    for i, axes in enumerate(grid.flat):
        if i >= len(layers):
            axes.set_visible(False)
            continue
        f = layers[i]
        for label, spectrum, color in (("plain", f.plain, PLAIN), ("on the data", f.weighted, DATA)):
            if spectrum is None:
                continue
            values = [max(v, floor / 10) for v in spectrum.relative]
            x = [k / max(len(values) - 1, 1) for k in range(len(values))]
            (line,) = axes.plot(x, values, color=color, lw=1.8, ls="-" if label == "plain" else (0, (4, 1)))
            handles.setdefault(label, line)
        axes.set_title(f"{_short(f.layer.name, 34)}\n{'×'.join(map(str, f.layer.shape))}", fontsize=7, linespacing=1.15)
        axes.set_yscale("log")
        axes.set_ylim(floor, 1.6)
        axes.set_yticks([10.0**e for e in range(round(math.log10(floor)), 1)])
        axes.set_xticks([0, 0.5, 1], ["0", "½", "1"])
        axes.minorticks_off()
        axes.grid(True)
        axes.tick_params(labelsize=8, labelbottom=i + columns >= len(layers))
    figure.supxlabel("index of the singular value, as a share of all", fontsize=10)
    figure.supylabel("singular value over the largest", fontsize=10)
    figure.suptitle(f"Spectra of the layers{note}", fontsize=12)
    if len(handles) > 1:
        figure.legend(handles.values(), handles.keys(), loc="outside upper right", ncols=2)


def _energy(figure: Any, found: Sequence[Found]) -> None:
    """What an SVD loses over the numbers it stores: a line per layer, coloured by depth."""
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    weighted = any(f.weighted for f in found)
    panels = ["plain", "on the data"] if weighted else ["plain"]
    figure.set_size_inches(5.4 * len(panels) + 1.2, 4.6)
    shades, depth = colormaps["viridis"], Normalize(1, max(len(found), 2))
    all_axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axes, which in zip(all_axes, panels, strict=True):
        for i, f in enumerate(found):
            spectrum = f.plain if which == "plain" else f.weighted
            if spectrum is None:
                continue
            count = form(svd_of(f.layer)).n_params
            sizes = [100 * count(f.layer.shape, r) / f.layer.weight.numel() for r in range(len(spectrum.squares) + 1)]
            lost = [100 * max(v, 1e-7) for v in spectrum.lost]
            axes.plot(sizes, lost, color=shades(0.92 * (i / max(len(found) - 1, 1))), lw=1.3, alpha=0.85)
        for share in ENERGIES:
            axes.axhline(100 * (1 - share), color=MUTED, lw=0.8, ls=(0, (2, 3)))
            axes.text(121, 100 * (1 - share), f"{share:.0%} kept", fontsize=8, color=MUTED, ha="left", va="center")
        axes.axvline(100, color=MUTED, lw=0.8)
        axes.text(101, 95, "dense", fontsize=8, color=MUTED, ha="left", va="top")
        axes.set_yscale("log")
        axes.set_xlim(0, 120)
        axes.set_ylim(1e-2, 115)
        axes.set_yticks([100, 10, 1, 0.1, 0.01], ["100", "10", "1", "0.1", "0.01"])
        axes.minorticks_off()
        axes.set_xlabel("numbers an SVD stores (% of the layer's)")
        axes.set_title("energy of the weight" if which == "plain" else "energy on the data")
        axes.grid(True)
    all_axes[0].set_ylabel("energy lost (%, log scale)")
    if len(found) > 1:
        from matplotlib.colors import ListedColormap

        used = ListedColormap(shades([0.92 * k / 255 for k in range(256)]))
        bar = figure.colorbar(ScalarMappable(depth, used), ax=list(all_axes), pad=0.02, aspect=30)
        bar.set_label("layer, from first to last")
        bar.set_ticks([1, len(found)])
        bar.outline.set_visible(False)


def _forms(figure: Any, found: Sequence[Found], share: float) -> None:
    """A heat map of relative errors at equal parameters: layers down, forms across, the best of each row framed."""
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    layers, note = _largest(found, _MOST_ROWS)
    names = sorted({c.form for f in layers for c in f.candidates})
    figure.set_size_inches(4.6 + 1.0 * max(len(names), 2), max(0.27 * len(layers) + 1.7, 3.2))
    axes = figure.subplots()
    errors = [f.rel_error(c) for f in layers for c in f.candidates]
    shades, scale = colormaps["cividis_r"], Normalize(0, max([0.1, *errors]))
    _cells(axes, layers, names, lambda error: shades(scale(error)))
    axes.set_xlim(0, max(len(names), 2))
    axes.set_ylim(len(layers) - 0.5, -0.5)
    axes.set_xticks(
        [i + 0.5 for i in range(len(names))],
        names,
        fontsize=9,
        rotation=30 if len(names) > 6 else 0,
        ha="left" if len(names) > 6 else "center",
    )
    axes.xaxis.tick_top()
    axes.set_yticks(range(len(layers)), [_short(f.layer.name, 40) for f in layers], fontsize=8)
    axes.tick_params(length=0)
    for side in ("left", "bottom"):
        axes.spines[side].set_visible(False)
    axes.set_title(
        f"Relative error at {share:.0%} of each layer's numbers, the best form framed{note}", fontsize=11, pad=14
    )
    bar = figure.colorbar(ScalarMappable(scale, shades), ax=axes, pad=0.02, aspect=max(12, len(layers)))
    bar.set_label("relative error, in the layer's norm")
    bar.outline.set_visible(False)


def _cells(axes: Any, layers: Sequence[Found], names: Sequence[str], shade: Callable[[float], Any]) -> None:
    """Fill the heat map: a number per form that was compared, a frame around the best, or the reason for none."""
    from matplotlib.patches import Rectangle

    small = {"fontsize": 8, "va": "center"}
    room = 34 + 12 * max(len(names) - 2, 0)
    for y, f in enumerate(layers):
        if not f.candidates:
            why = f.why or ""
            why = why if len(why) <= room else f"{why[: room - 1]}…"
            axes.text(0.0, y, why, color=MUTED, ha="left", style="italic", **small)
            continue
        for c in f.candidates:
            x, error = names.index(c.form), f.rel_error(c)
            red, green, blue, _ = color = shade(error)
            axes.add_patch(Rectangle((x, y - 0.5), 1, 1, facecolor=color, edgecolor="white", lw=1.2))
            ink = "white" if 0.299 * red + 0.587 * green + 0.114 * blue < 0.5 else INK
            weight = "bold" if c is f.best else "normal"
            axes.text(x + 0.5, y, _two_digits(error), color=ink, ha="center", fontweight=weight, **small)
        for x in set(range(len(names))) - {names.index(c.form) for c in f.candidates}:
            axes.text(x + 0.5, y, "–", color=MUTED, ha="center", **small)
    for y, f in enumerate(layers):  # last, so that no neighbour covers a frame
        if f.best is not None:
            corner = names.index(f.best.form) + 0.04, y - 0.42
            axes.add_patch(Rectangle(corner, 0.92, 0.84, fill=False, edgecolor=DATA, lw=2.2))
