"""`lrcompress recover`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from ..errors import CommandError
from .options import compute_options, online_option
from .output import Result, Shell, common, human_bytes


@click.command(epilog="Example: lrcompress recover --data train.npz --adapter lora --rank 8 --name first")
@click.argument("compressed", default="compressed", type=click.Path())
@click.option("--data", required=True, metavar="DATA", help="Inputs (and labels) to train on.")
@click.option("--select", metavar="DATA", help="Held-out data that decides when to stop; default: a tenth of --data.")
@click.option(
    "--adapter",
    "adapter_kind",
    default="lora",
    show_default=True,
    metavar="KIND",
    help="lora, loha, lokr, lokh or core.",
)
@click.option("--rank", type=int, default=8, show_default=True)
@click.option("--alpha", type=float, help="Scaling is alpha/rank; default alpha = rank.")
@click.option("--rank-pattern", multiple=True, metavar="GLOB=N", help="Another rank for layers whose path matches.")
@click.option("--alpha-pattern", multiple=True, metavar="GLOB=A", help="Another alpha for layers whose path matches.")
@click.option("--name", help="Name of the adapter; default: the output's name, or 'recover'.")
@click.option(
    "--loss", default="auto", show_default=True, help="logits, embedding (both distil the original), labels, or auto."
)
@click.option("--metric", help="Metric on --select that picks the best state; default: the loss.")
@click.option("--steps", type=int, default=400, show_default=True)
@click.option("--batch-size", type=click.IntRange(min=1), default=64, show_default=True)
@click.option("--learning-rate", type=float, default=2e-3, show_default=True)
@click.option("--max-seconds", type=float, help="Stop after this time (the result then depends on the machine).")
@click.option(
    "--closed", type=click.Choice(["auto", "only", "off", "refit"]), default="auto", show_default=True,
    help="auto: training starts from closed forms; only: nothing is trained; off; refit: change the base itself.",
)  # fmt: skip
@click.option("--original", type=click.Path(), help="The model that was factorized, if it moved.")
@click.option("--trust-pickle", is_flag=True, help="Allow an original that can run code while it is opened.")
@click.option("--trust-remote-code", is_flag=True, help="Allow code that a Hugging Face folder brings.")
@click.option("-o", "--output", type=click.Path(), help="Folder to write  [default: adapters/NAME]")
@compute_options
@online_option
@common
def recover(
    shell: Shell, compressed: str, name: str | None, output: str | None, rank_pattern: tuple[str, ...],
    alpha_pattern: tuple[str, ...], **options: Any,
) -> Result:  # fmt: skip
    """Train a correction of the factorized model COMPRESSED that wins its accuracy back.

    The factors stay frozen; what is trained can be shipped later as a payload of a few kilobytes.
    """
    from ..verbs.recover import recover as verb

    name = name or (Path(output).name if output else "recover")
    options |= {"rank_pattern": _numbers(rank_pattern, int), "alpha_pattern": _numbers(alpha_pattern, float)}
    output = output or ("recovered" if options["closed"] == "refit" else f"adapters/{name}")
    found = verb(compressed, name=name, output=output, progress=shell.progress, **options)
    d = found.data
    if options["closed"] == "refit":
        return Result(d, text=_refit_lines(d))

    def show(value: float | None) -> str:
        return "–" if value is None else f"{value:.4f}"

    lines = [
        f"{d['metric']} on held-out data: original {show(d['original'])}, before {show(d['before'])}, after {show(d['after'])}",
        f"loss ({d['loss']['kind']}) {d['loss']['before']:.4g} → {d['loss']['after']:.4g}, best at step {d['best_step']} of {d['steps']}",
        f"{d['trainable_params']:,} trained numbers ({human_bytes(d['payload_bytes'])} as fp32), {d['train_seconds']:.1f} s",
        f"written to {d['output']}",
    ]
    if d["closed"] is not None:
        lines[1:1] = _closed_lines(d["closed"])
    return Result(d, text="\n".join(lines))


def _closed_lines(closed: dict[str, Any]) -> list[str]:
    """Return what closed forms did, a line per layer with its reason."""
    rows, applied = closed["layers"], [row for row in closed["layers"] if row["applied"]]
    head = f"closed form: loss {closed['before']:.4g} → {closed['after']:.4g}, {len(applied)} of {len(rows)} layers"
    return [f"{head} ({human_bytes(closed['bytes'])}), {closed['seconds']:.1f} s", *map(_row_line, rows)]


def _refit_lines(d: dict[str, Any]) -> str:
    changed = sum(row["applied"] for row in d["layers"])
    head = f"refit: loss {d['before']:.4g} → {d['after']:.4g}, {changed} of {len(d['layers'])} layers"
    lines = [f"{head} ({human_bytes(d['bytes'])} more), {d['seconds']:.1f} s", *map(_row_line, d["layers"])]
    return "\n".join([*lines, f"written to {d['output']}" if d["output"] else "nothing written"])


def _row_line(row: dict[str, Any]) -> str:
    if row["error_before"] is None:
        return f"  {row['layer']}: {row['reason']}"
    return f"  {row['layer']}: error {row['error_before']:.3g} → {row['error_after']:.3g}; {row['reason']}"


def _numbers(pairs: tuple[str, ...], kind: type[int] | type[float]) -> dict[str, Any]:
    """Return GLOB=NUMBER pairs as a dict in their order."""
    found: dict[str, Any] = {}
    for pair in pairs:
        glob, _, number = pair.rpartition("=")
        try:
            found[glob] = kind(number)
        except ValueError:
            found.pop(glob, None)
        if not glob or not found.get(glob, 0) > 0:
            raise CommandError(
                "lrcompress recover", f"GLOB=NUMBER ({kind.__name__}, above 0)", pair, "for example 'fc*=4'"
            )
    return found
