"""The report as one HTML page: the template is `report.html.j2`, everything it shows stands inside it."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.resources import files
from typing import Any

from . import words
from .plots import draw

_CAPTIONS = {
    "bytes": "Accuracy over bytes on disk: up and to the left is better.",
    "device": "What the device itself answered, as delivered and after each update.",
    "layers": "Parameters before and after, with the relative error of each factorization in its own norm (table below).",
    "spectra": "Singular values of the original weights as they are, without the activations: "
    "where a curve falls late, a low rank costs accuracy unless the activations allow it.",
}
_TITLES = {"bytes": "Accuracy over bytes", "device": "The device", "layers": "Layer by layer", "spectra": "Spectra"}


def render(report: Mapping[str, Any]) -> str:
    """Return the page."""
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string((files(__package__) / "report.html.j2").read_text(encoding="utf-8"))
    plots = {name: Markup(svg) for name, svg in draw(report).items()}
    tables = {
        "rows": words.rows_of(report),
        "device": words.device_rows_of(report),
        "updates": words.updates_of(report),
    }
    return template.render(
        report=report,
        tables=tables,
        plots=plots,
        shifts=words.shifts_of(report),
        captions=_CAPTIONS,
        titles=_TITLES,
        layers=[_layer(r) for r in report["layers"]],
    )


def _layer(row: Mapping[str, Any]) -> list[str]:
    rank = row["rank"]
    shown = "–" if rank is None else "×".join(map(str, rank)) if isinstance(rank, list | tuple) else str(rank)
    error = "–" if row["rel_error"] is None or row["form"] == "dense" else f"{row['rel_error']:.4f} ({row['norm']})"
    shape = "×".join(map(str, row["shape"]))
    return [
        row["name"],
        shape,
        row["form"],
        shown,
        f"{row['params_before']:,}",
        f"{row['params_after']:,}",
        error,
        row["reason"] or "",
    ]
