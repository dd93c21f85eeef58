"""`lrcompress export`."""

from __future__ import annotations

from collections import Counter
from typing import Any

import click

from .options import online_option
from .output import Result, Shell, common, human_bytes


@click.command(epilog="Example: lrcompress export --target onnx --quantize int8 --calib images.npz")
@click.argument("compressed", default="compressed", type=click.Path())
@click.option("--target", default="onnx", show_default=True, help="What to write: onnx.")
@click.option(
    "--slots",
    help="Adapter slots to wire: lora (which also serves LoHa, LoKr, LoKH), core, dora (for LoRA with "
    "magnitudes), several as lora,core, or none.  "
    "[default: lora, and core where layers are factorized]",
)
@click.option("--slot-include", multiple=True, metavar="GLOB", help="Only layers whose path matches get a slot.")
@click.option(
    "--quantize",
    default="none",
    show_default=True,
    help="none, fp16, int8, int4, or plan: what --plan gave each layer.",
)
@click.option(
    "--calib", metavar="DATA", help="Inputs to quantize by (needed for int8 convolutions) and for the golden set."
)
@click.option("--block", type=int, help="Inputs that share a scale at 4 bits: 16…256.  [default: 32, or the plan's]")
@click.option("--merge", metavar="NAME", help="Bake this adapter in instead of shipping it.")
@click.option(
    "--adapter",
    "adapters",
    multiple=True,
    type=click.Path(),
    help="Adapter to ship as a payload  [default: all of adapters/]",
)
@click.option(
    "--emit", multiple=True, metavar="FORMAT", help="Write beside each payload: onnx_adapter (for C, C++, C#)."
)
@click.option("--original", type=click.Path(), help="The model that was factorized, if it moved.")
@click.option(
    "--device", metavar="NAME|FILE", help="Device profile whose limits go into device.json, e.g. raspberry-pi-4."
)
@click.option(
    "--kv-cache", is_flag=True, help="Decoders: keys and values so far are inputs and outputs, for token by token."
)
@click.option("--name", help="Name of the model in manifests and repositories.")
@click.option("--trust-pickle", is_flag=True, help="Allow an original that can run code while it is opened.")
@click.option("--trust-remote-code", is_flag=True, help="Allow code that a Hugging Face folder brings.")
@click.option("-o", "--output", default="exported", show_default=True, type=click.Path(), help="Folder to write.")
@online_option
@common
def export(shell: Shell, compressed: str, slots: str | None, adapters: tuple[str, ...], **options: Any) -> Result:
    """Write the factorized model COMPRESSED as ONNX: a graph, its constants, adapter slots, goldens, a manifest."""
    from ..verbs.export import export as verb

    kinds = None if slots is None else tuple(s.strip() for s in slots.split(","))
    d = verb(compressed, slots=kinds, adapters=adapters or None, progress=shell.progress, **options).data
    lines = [
        f"graph {human_bytes(d['bytes']['graph'])}, constants {human_bytes(d['bytes']['base'])}, {len(d['slots'])} slots, {d['precision']}",
        *_weights(d["weights"]),
        f"base {d['base_id'][:16]}",
        *(f"payload {p['path']}: {human_bytes(p['bytes'])}" for p in d["payloads"]),
        f"written to {d['output']}",
    ]
    return Result(d, text="\n".join(lines))


def _weights(rows: list[dict[str, Any]]) -> list[str]:
    """Say how many weights got how many bits, which lost most, and what was not done as asked."""
    counts = Counter(r["bits"] for r in rows if "bits" in r)
    lines = [f"weights: {', '.join(f'{n} in {bits} bits' for bits, n in sorted(counts.items()))}"] if counts else []
    worst = max((r for r in rows if "rel_error" in r), key=lambda r: r["rel_error"], default=None)
    if worst is not None:
        lines.append(f"largest error {100 * worst['rel_error']:.2g} % of its output, in {worst['name']}")
    lines += [r["gauge"] for r in rows if r["kind"] == "layer"]
    return lines + [f"{r['name']} stays in {r['bits']} bits: {r['reason']}" for r in rows if "reason" in r]
