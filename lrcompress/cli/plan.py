"""`lrcompress plan`."""

from __future__ import annotations

from typing import Any

import click

from .options import (
    Bits,
    Size,
    arch_arguments,
    cache_option,
    compute_options,
    model_options,
    online_option,
    planning_options,
)
from .output import Result, Shell, common, human_bytes, table


@click.command(
    epilog="Examples: lrcompress plan model.safetensors --arch nets.py:resnet20 --calib images.npz --ratio 0.5; "
    "lrcompress plan model --calib texts.tsv --device raspberry-pi-4 --latency table.json --max-bytes 6MB --max-ms 20"
)
@click.argument("model")
@click.option("--ratio", type=float, help="Parameters of the whole model, after divided by before.")
@click.option("--max-params", type=int, metavar="N", help="Parameters of the whole model.")
@click.option(
    "--max-bytes",
    type=Size(),
    metavar="SIZE",
    help="Bytes of all its tensors, e.g. 6MB; with --device, --max-ms or --bits those of the exported graph and constants.",
)
@click.option("--max-ms", type=float, metavar="MS", help="Milliseconds of one request on the device; needs its table.")
@click.option("--device", metavar="NAME|FILE", help="A device profile: bits are chosen too, and its table is used.")
@click.option("--latency", metavar="FILE", type=click.Path(), help="The table of 'lrcompress device profile'.")
@click.option("--bits", type=Bits(), metavar="LIST", help="Bits to choose from.  [default for devices: 32,16,8,4]")
@click.option("--method", help="A decomposition (svd, tucker, kronecker, …), or auto: the default with --calib.")
@click.option("--calib", metavar="DATA", help="Inputs to weigh errors by, and to measure on.")
@planning_options
@click.option("--include", multiple=True, metavar="GLOB", help="Only layers whose path matches.")
@click.option("--exclude", multiple=True, metavar="GLOB", help="No layer whose path matches.")
@click.option("-o", "--output", default="plan.json", show_default=True, type=click.Path(), help="File to write.")
@model_options
@compute_options
@cache_option
@online_option
@common
def plan(shell: Shell, model: str, inputs: tuple[str, ...], arch_args: tuple[str, ...], **options: Any) -> Result:
    """Choose form and rank, and for a device the bits, of every layer of MODEL under a budget.

    The plan says for every layer what it becomes, what that should lose, and what was rejected and why. Edit it if you
    know better, and apply it with `factorize --plan`.
    """
    from ..model import parse_input
    from ..verbs.plan import plan as verb

    found = verb(
        model,
        inputs=[parse_input(i) for i in inputs],
        arch_args=arch_arguments(arch_args),
        progress=shell.progress,
        **options,
    )
    return Result(found.data, text=describe(found.data))


def describe(data: dict[str, Any]) -> str:
    """Return a plan as text: a row per layer, with the alternative that came nearest."""
    if "uniform" in data:
        return describe_device(data)
    rows = []
    for layer in data["layers"]:
        rank, dense = layer["rank"], layer["form"] == "dense"
        nearest = next((r for r in layer["rejected"] if r["form"] != "dense"), None)
        why = layer.get("reason") or ("" if nearest is None else f"{nearest['form']}: {nearest['why']}")
        rows.append(
            [
                layer["name"], layer["form"],
                "–" if dense else ("×".join(map(str, rank)) if isinstance(rank, list) else str(rank)),
                f"{layer['params']:,}", human_bytes(layer["bytes"]), _loss(layer["predicted_loss"]),
                _loss(layer["measured_loss"]), why,
            ]
        )  # fmt: skip
    header = ["layer", "form", "rank", "params", "bytes", "loss", "alone", "rejected, or why dense"]
    lines = [table(header, rows, left=2), ""]
    [(unit, limit)] = data["budget"].items()
    after = "" if data["params_after"] is None else f"; parameters {data['params_before']:,} → {data['params_after']:,}"
    lines.append(f"budget {limit:,} {unit}{after}")
    lines.append(
        f"predicted loss {_loss(data['predicted_loss'])}, no plan of these options below {_loss(data['bound'])}"
    )
    if data["measured_loss"] is not None:
        lines.append(
            f"measured with all layers changed, before they are fitted to each other: {_loss(data['measured_loss'])}"
        )
    if data["output"]:
        lines.append(f"written to {data['output']}")
    return "\n".join(lines)


def describe_device(data: dict[str, Any]) -> str:
    """Return a plan for a device as text: form, rank and bits of every layer, and the dense network beside it."""
    rows = []
    for layer in data["layers"]:
        rank, nearest = layer["rank"], next(iter(layer["rejected"]), None)
        size = "–" if layer["form"] == "dense" else "×".join(map(str, rank)) if isinstance(rank, list) else str(rank)
        other = (
            ""
            if nearest is None
            else f"{nearest['form']} {_rank(nearest['rank'])}{nearest['bits']} bits: {nearest['why']}"
        )
        rows.append(
            [layer["name"], layer["form"], size, str(layer["bits"]), human_bytes(layer["bytes"]), _time(layer["ms"]),
             _loss(layer["predicted_loss"]), other]
        )  # fmt: skip
    lines = [table(["layer", "form", "rank", "bits", "bytes", "ms", "loss", "nearest alternative"], rows, left=2), ""]
    whole = [
        [
            "this plan",
            human_bytes(data["bytes"]),
            _time(data["ms"]),
            _loss(data["predicted_loss"]),
            _loss(data["measured_loss"]),
            "",
        ]
    ]
    for u in data["uniform"]:
        fits = "" if u["fits"] else "over the budget"
        whole.append(
            [
                u["name"],
                human_bytes(u["bytes"]),
                _time(u["ms"]),
                _loss(u["predicted_loss"]),
                _loss(u["measured_loss"]),
                fits,
            ]
        )
    lines += [table(["whole model", "bytes", "ms", "predicted loss", "measured", ""], whole, left=1), ""]
    limits = " and ".join(f"{v:,} {k}" for k, v in data["budget"].items())
    threads = "" if data["threads"] is None else f" at {data['threads']} thread{'s' * (data['threads'] > 1)}"
    lines.append(f"budget {limits}{threads}; no choice loses less than {_loss(data['bound'])}")
    lines.append(data["advice"])
    if data["output"]:
        lines.append(f"written to {data['output']}")
    return "\n".join(lines)


def _rank(rank: Any) -> str:
    return "" if rank == 0 else f"{'×'.join(map(str, rank)) if isinstance(rank, list) else rank}, "


def _time(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def _loss(value: float | None) -> str:
    return "–" if value is None else f"{value:.3g}"
