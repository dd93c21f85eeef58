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
@click.option("--include", multiple=True, metavar="GLOB", help="Adapters only on layers whose path matches.")
@click.option("--rank-pattern", multiple=True, metavar="GLOB=N", help="Another rank for layers whose path matches.")
@click.option("--alpha-pattern", multiple=True, metavar="GLOB=A", help="Another alpha for layers whose path matches.")
@click.option("--rslora", is_flag=True, help="LoRA scaled by alpha/√rank.")
@click.option("--dora", is_flag=True, help="LoRA with a trained norm per output; ship it with export --slots dora.")
@click.option("--name", help="Name of the adapter; default: the output's name, or 'recover'.")
@click.option(
    "--train", default="adapters", show_default=True, metavar="adapters|factors",
    help="Train adapters on frozen factors, or the factors, biases and scales themselves.",
)  # fmt: skip
@click.option(
    "--loss", default="auto", show_default=True, metavar="NAME[=WEIGHT],…",
    help="logits, embedding, hidden (these distil the original), labels, auto, or a weighted sum.",
)  # fmt: skip
@click.option(
    "--hidden", multiple=True, metavar="GLOB", help="Modules that the loss 'hidden' compares; default: the blocks."
)
@click.option(
    "--temperature", default="auto", show_default=True, metavar="T|inf|auto",
    help="Temperature of the loss 'logits'; inf matches the scores themselves; auto: inf for one row of scores, else 2.",
)  # fmt: skip
@click.option("--augment", is_flag=True, help="Images: flip and shift them, for the original and the model alike.")
@click.option(
    "--mix/--no-mix",
    default=None,
    help="Blend samples in pairs  [default: where inputs are no tokens and no labels are learnt]",
)
@click.option(
    "--metric",
    help="Metric on --select that decides: the last state not clearly worse than the best; default: the loss.",
)
@click.option("--steps", type=int, help="Steps of training  [default: 400, or what --max-seconds allows]")
@click.option(
    "--batch-size", type=click.IntRange(min=1), default=64, show_default=True, help="Samples of all processes."
)
@click.option("--accumulate", type=int, default=1, show_default=True, help="Pieces that a batch is run in, for memory.")
@click.option("--lr", "--learning-rate", "learning_rate", default="auto", show_default=True, metavar="RATE|auto")
@click.option(
    "--patience", type=int, default=0, show_default=True, help="Evaluations without gain until it stops; 0: never."
)
@click.option("--max-seconds", type=float, help="Train for this time (the result then depends on the machine).")
@click.option("--checkpointing", is_flag=True, help="Keep inputs of blocks only, and run blocks again for gradients.")
@click.option("--precision", default="auto", show_default=True, metavar="auto|fp32|bf16")
@click.option(
    "--save-seconds", type=float, default=30.0, show_default=True, help="How often a state is kept to resume from."
)
@click.option(
    "--closed", type=click.Choice(["auto", "only", "off", "refit"]), default="auto", show_default=True,
    help="auto: training starts from closed forms; only: nothing is trained; off; refit: change the base itself.",
)  # fmt: skip
@click.option("--processes", type=int, metavar="N", help="Fail unless torchrun started N processes.")
@click.option("--shard-teacher", is_flag=True, help="Spread the original over all processes.")
@click.option(
    "--log", type=click.Path(), metavar="DIR", help="TensorBoard log  [default: OUTPUT.tensorboard, if installed]"
)
@click.option("--original", type=click.Path(), help="The model that was factorized, if it moved.")
@click.option("--trust-pickle", is_flag=True, help="Allow an original that can run code while it is opened.")
@click.option("--trust-remote-code", is_flag=True, help="Allow code that a Hugging Face folder brings.")
@click.option("-o", "--output", type=click.Path(), help="Folder to write  [default: adapters/NAME, or recovered]")
@compute_options
@online_option
@common
def recover(
    shell: Shell, compressed: str, name: str | None, output: str | None, rank_pattern: tuple[str, ...],
    alpha_pattern: tuple[str, ...], **options: Any,
) -> Result:  # fmt: skip
    """Train the factorized model COMPRESSED so that it wins its accuracy back.

    An adapter leaves the factors as they are and can be shipped later as a payload of a few kilobytes. With --train
    factors the factors themselves are trained: another compressed folder, of the same size.
    """
    from ..verbs.recover import recover as verb

    name = name or (Path(output).name if output else "recover")
    rebased = options["train"] == "factors" or options["closed"] == "refit"
    output = output or ("recovered" if rebased else f"adapters/{name}")
    options |= {"rank_pattern": _numbers(rank_pattern, int), "alpha_pattern": _numbers(alpha_pattern, float)}
    d = verb(compressed, name=name, output=output, progress=shell.progress, **options).data
    if options["closed"] == "refit":
        return Result(d, text=_refit_lines(d))

    def show(value: float | None) -> str:
        return "–" if value is None else f"{value:.4f}"

    lines = [
        f"{d['metric']} on held-out data: original {show(d['original'])}, before {show(d['before'])}, after {show(d['after'])}",
        f"loss ({d['loss']['kind']}) {d['loss']['before']:.4g} → {d['loss']['after']:.4g}, best at step {d['best_step']} of {d['steps']}"
        + (" (ended by patience)" if d["stopped"] == "patience" else "")
        + f", learning rate {d['learning_rate']:.2g}",
        f"{d['trainable_params']:,} trained numbers ({human_bytes(d['payload_bytes'])} as fp32), {d['train_seconds']:.1f} s"
        + ("" if d["same_anywhere"] else "; the clock ended it: another run gives other bytes"),
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
