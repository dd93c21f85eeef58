"""`lrcompress inspect`."""

from __future__ import annotations

from typing import Any

import click

from .options import arch_arguments, cache_option, compute_options, model_options, online_option
from .output import Result, Shell, common, table


@click.command(
    epilog="Examples: lrcompress inspect model.safetensors · "
    "lrcompress inspect model.safetensors --arch nets.py:resnet20 --calib images.npz -o inspected · "
    "lrcompress inspect --theory hadamard"
)
@click.argument("model", required=False)
@click.option(
    "--theory", metavar="FORM", help="Check what a form (or all) can represent, instead of looking at a model."
)
@click.option(
    "--calib",
    metavar="DATA",
    help="Inputs to weight errors by: .npz, .safetensors, .tsv, a folder, RECIPE.yaml:SPLIT, pkg.mod:callable, kept statistics.",
)
@click.option(
    "--share",
    type=float,
    default=0.5,
    show_default=True,
    help="Share of a layer's numbers at which forms are compared.",
)
@click.option(
    "--max-loss",
    type=float,
    default=0.25,
    show_default=True,
    help="Share of its energy that a layer may lose there and still be worth it.",
)
@click.option(
    "--all-forms", is_flag=True, help="Compare every form: those that save bytes only, need training, or take long."
)
@click.option("--include", multiple=True, metavar="GLOB", help="Only layers whose path matches.")
@click.option("--exclude", multiple=True, metavar="GLOB", help="No layer whose path matches.")
@click.option("-o", "--output", type=click.Path(), help="Folder for the plots (PNG and SVG) and all singular values.")
@model_options
@compute_options
@cache_option
@online_option
@common
def inspect(
    shell: Shell, model: str | None, inputs: tuple[str, ...], arch_args: tuple[str, ...], **options: Any
) -> Result:
    """Look at the layers of MODEL: which are low-rank, which form fits them best, which are not worth factorizing.

    MODEL is what `factorize` takes. With --calib every spectrum and error is also measured on what the layer really
    reads. With --theory no model is needed: the statements on what a form can represent are checked numerically.
    """
    from ..model import parse_input
    from ..verbs.inspect import inspect as verb

    found = verb(
        model,
        inputs=[parse_input(i) for i in inputs],
        arch_args=arch_arguments(arch_args),
        progress=shell.progress,
        **options,
    )
    if "theory" in found.data:
        return Result(found.data, text=theory_page(found.data), exit_code=0 if found.data["holds"] else 5)
    return Result(found.data, text=describe(found.data))


def describe(data: dict[str, Any]) -> str:
    """Return the report as text: spectra, forms, what is not worth it, a summary."""
    weighted = any(layer["spectrum"]["weighted"] for layer in data["layers"])
    parts = [
        _spectra(data["layers"], weighted=weighted),
        _forms(data["layers"], data["share"]),
        _not_worth(data["layers"]),
        _notes(data, weighted=weighted),
    ]
    return "\n\n".join(p for p in parts if p)


def _spectra(layers: list[dict[str, Any]], *, weighted: bool) -> str:
    rows = []
    for layer in layers:
        plain, other = layer["spectrum"]["plain"], layer["spectrum"]["weighted"]
        cells = [layer["name"], layer["kind"], "×".join(map(str, layer["shape"])), f"{layer['params']:,}"]
        if plain is None:
            rows.append([*cells, *["–"] * 6])
            continue

        def both(text: Any, plain: Any = plain, other: Any = other) -> str:
            return f"{text(plain)} → {text(other)}" if other else text(plain)

        cells += [
            str(plain["full_rank"]),
            both(lambda s: f"{s['stable_rank']:.1f}"),
            both(lambda s: f"{s['effective_rank']:.1f}"),
        ]
        for i in range(len(plain["energies"])):
            size = (other or plain)["energies"][i]["params_ratio"]
            cells.append(both(lambda s, i=i: str(s["energies"][i]["rank"])) + f" ({size:.0%})")
        rows.append(cells)
    shares = [
        f"{e['energy']:.0%}"
        for e in next((x["spectrum"]["plain"]["energies"] for x in layers if x["spectrum"]["plain"]), [])
    ] or ["", "", ""]
    header = ["layer", "kind", "shape", "numbers", "full", "stable", "effective", *(f"rank at {s}" for s in shares)]
    title = (
        "Spectra: plain → on the data (size of an SVD at that rank)"
        if weighted
        else "Spectra (size of an SVD at that rank)"
    )
    return f"{title}\n\n{table(header, rows, left=3)}"


def _forms(layers: list[dict[str, Any]], share: float) -> str:
    rows = []
    for layer in (x for x in layers if x["best"]):
        best, first = layer["best"], layer["forms"][0]
        rank = first["rank"]
        rows.append(
            [
                layer["name"], first["form"], best["runner_up"] or "–", "×".join(map(str, rank)) if isinstance(rank, list) else str(rank),
                f"{first['params']:,}", f"{first['rel_error']:.3f}", _times(first["macs_ratio"]), _times(best["loss_over_svd"]),
                _times(best["loss_over_runner_up"]), "yes" if layer["worth"] else "no",
            ]
        )  # fmt: skip
    if not rows:
        return ""
    header = ["layer", "best form", "then", "rank", "numbers", "error", "MACs", "loss/svd", "loss/then", "worth it"]
    return f"Forms at {share:.0%} of each layer's numbers\n\n{table(header, rows, left=3)}"


def _times(ratio: float | None) -> str:
    return "–" if ratio is None else f"{ratio:.2f}×" if ratio >= 0.005 else f"{ratio:.0e}×"


def _not_worth(layers: list[dict[str, Any]]) -> str:
    rows = [[layer["name"], layer["why"]] for layer in layers if not layer["worth"]]
    return f"Not worth factorizing\n\n{table(['layer', 'why'], rows, left=2)}" if rows else ""


def _notes(data: dict[str, Any], *, weighted: bool) -> str:
    s = data["summary"]
    wins = ", ".join(f"{form} {n}" for form, n in s["wins"].items())
    lines = [
        f"{s['worth']} of {s['layers']} layers are worth factorizing{f' ({wins})' if wins else ''}: "
        f"{s['params_before']:,} → {s['params_after']:,} numbers at this share"
    ]
    if s["left_out_by_patterns"]:
        lines.append(f"{s['left_out_by_patterns']} layers are left out by --include/--exclude")
    costly: dict[str, list[str]] = {}
    for layer in data["layers"]:
        for n in layer["not_compared"]:
            if n["cause"] == "cost":
                costly.setdefault(f"{n['form']} ({n['why']})", []).append(layer["name"])
    lines += [
        f"not compared for its cost: {form} on {names[0]}{f' and {len(names) - 1} more' if names[1:] else ''}; --all-forms does it"
        for form, names in costly.items()
    ]
    norms = sorted({layer["norm"] for layer in data["layers"] if layer["norm"]})
    d = data["definitions"]
    lines += ["", f"stable: {d['stable_rank']}", f"effective: {d['effective_rank']}"]
    lines += [f"error: {d['rel_error']}, here {', '.join(norms)}"] if norms else []
    if weighted:
        lines.append(f"norms: {d['norm']}")
    if data["output"]:
        lines.append(f"plots written to {data['output']}")
    return "\n".join(lines)


def theory_page(data: dict[str, Any]) -> str:
    """Return the checked statements as a page: words, formula, what was tried, what was found."""
    lines: list[str] = []
    statements = [s for f in data["forms"] for s in f["statements"]]
    for form in data["forms"]:
        title = f"{form['form']}: {form['formula']}"
        lines += [title, "─" * len(title)]
        for s in form["statements"]:
            lines += [
                "",
                f"{'holds        ' if s['holds'] else 'DOES NOT HOLD'}  {s['words']}",
                f"{'':15}{s['formula']}",
            ]
            width = max(len(c["size"]) for c in s["cases"])
            expected = max(len(c["expected"]) for c in s["cases"])
            lines += [
                f"{'':15}· {c['size'].ljust(width)}   expected {c['expected'].ljust(expected)}   found {c['found']}{'' if c['holds'] else '   ✗'}"
                for c in s["cases"]
            ]
        lines += ["", ""]
    held = sum(s["holds"] for s in statements)
    lines.append(
        f"{held} of {len(statements)} statements hold (float64, seed {data['seed']}; ranks at 1e-7 of the largest singular value)"
    )
    return "\n".join(lines)
