"""`lrcompress adapt`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from .options import Size, compute_options, online_option
from .output import Result, Shell, common, human_bytes, table


@click.command(
    epilog="Example: lrcompress adapt --data new_speaker.npz --metric accuracy --max-bytes 16kB --name speaker"
)
@click.argument("compressed", default="compressed", type=click.Path())
@click.option("--data", required=True, metavar="DATA", help="Inputs and labels of the new task or domain.")
@click.option(
    "--select", metavar="DATA", help="Held-out data that the kinds are compared on; default: a tenth of --data."
)
@click.option(
    "--adapter", "adapter_kinds", metavar="KIND,…", default="", help="Kinds to compare; default: all that fit."
)
@click.option(
    "--max-bytes", type=Size(), default="16KB", show_default=True, metavar="SIZE", help="Of a kind's numbers."
)
@click.option(
    "--encoding", default="f16", show_default=True, metavar="f16|int8|int4",
    help="What its numbers are counted as and rounded to: 2 bytes each, 1, or half of one, with scales, without a payload's names and golden outputs.",
)  # fmt: skip
@click.option("--name", default="adapt", show_default=True, help="Name of the adapter.")
@click.option("--metric", help="Metric on --select that decides, the loss among equals; default: the loss.")
@click.option(
    "--loss", default="auto", show_default=True, metavar="NAME[=WEIGHT],…", help="Default: labels, if there are any."
)
@click.option("--augment", is_flag=True, help="Images: flip and shift them.")
@click.option("--steps", type=int, help="Steps for each kind  [default: 400, or what --max-seconds allows]")
@click.option("--batch-size", type=click.IntRange(min=1), default=64, show_default=True)
@click.option("--lr", "--learning-rate", "learning_rate", default="auto", show_default=True, metavar="RATE|auto")
@click.option("--patience", type=int, default=0, show_default=True, help="Evaluations without gain until a kind stops.")
@click.option(
    "--max-seconds", type=float, help="Train each kind for this time (the result then depends on the machine)."
)
@click.option("--precision", default="auto", show_default=True, metavar="auto|fp32|bf16")
@click.option("--original", type=click.Path(), help="The model that was factorized, if it moved.")
@click.option("--trust-pickle", is_flag=True, help="Allow an original that can run code while it is opened.")
@click.option("--trust-remote-code", is_flag=True, help="Allow code that a Hugging Face folder brings.")
@click.option("-o", "--output", type=click.Path(), help="Folder to write  [default: adapters/NAME]")
@compute_options
@online_option
@common
def adapt(shell: Shell, compressed: str, adapter_kinds: str, name: str, output: str | None, **options: Any) -> Result:
    """Adapt the factorized model COMPRESSED to new data, its factors frozen.

    Adapters of several kinds are trained within the same bytes; the one that is best on held-out data is written, and
    what each was worth is printed.
    """
    from ..verbs.adapt import adapt as verb

    asked = tuple(k.strip() for k in adapter_kinds.split(",") if k.strip())
    output = output or str(Path("adapters") / name)
    d = verb(compressed, adapter_kinds=asked, name=name, output=output, progress=shell.progress, **options).data
    return Result(d, text=describe(d))


def describe(d: dict[str, Any]) -> str:
    """Return the comparison as text: a row per kind, the best first."""
    rows = [
        [
            ("* " if row["kind"] == d["best"] else "  ") + row["kind"], human_bytes(row["bytes"]), f"{row['numbers']:,}",
            str(len(row["ranks"])), f"{row['before']:.4f}", f"{row['after']:.4f}", f"{row['loss']:.4g}",
            f"{row['steps']}", f"{row['seconds']:.1f}",
        ]
        for row in d["kinds"]
    ]  # fmt: skip
    header = ["kind", "bytes", "numbers", "layers", "before", "after", "loss", "steps", "s"]
    lines = [f"{d['metric']} on {d['n']} held-out samples, within {human_bytes(d['max_bytes'])}:", ""]
    lines += [table(header, rows, left=1), "", *d["hints"], f"{d['best']} written to {d['output']}"]
    return "\n".join(lines)
