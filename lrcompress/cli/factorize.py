"""`lrcompress factorize`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from .options import arch_arguments, cache_option, compute_options, model_options, online_option, planning_options
from .output import Result, Shell, common, human_bytes, table


@click.command(
    epilog="Examples: lrcompress factorize model.pt --rank 16 · "
    "lrcompress factorize model.safetensors --arch nets.py:resnet20 --ratio 0.5 --calib images.npz · "
    "lrcompress factorize model.onnx --ratio 0.5 --calib images.npz"
)
@click.argument("model")
@click.option("--rank", type=int, help="Rank of every layer, at most its full rank.")
@click.option("--ratio", type=float, help="Parameters of the whole model, after divided by before.")
@click.option("--energy", type=float, help="Share of the squared singular values that each layer keeps.")
@click.option("--plan", type=click.Path(), help="A plan file that names form and rank of every layer.")
@click.option("--method", help="A decomposition (svd, tucker, kronecker, …), or auto: the default with --calib.")
@click.option(
    "--calib",
    metavar="DATA",
    help="Inputs to weight errors by: .npz, .safetensors, .tsv, a folder, RECIPE.yaml:SPLIT, pkg.mod:callable, kept statistics.",
)
@click.option(
    "--svd",
    type=click.Choice(["auto", "full", "randomized"]),
    default="auto",
    show_default=True,
    help="How the SVD is computed: auto takes the cheaper.",
)
@planning_options
@click.option(
    "--anchor/--no-anchor",
    default=True,
    help="With --calib: fit each layer to what those before it changed, in the order of depth (the default), or alone.",
)
@click.option("--workers", type=int, metavar="N", help="Spread the layers over N processes of this machine.")
@click.option("--cluster", metavar="ADDRESS", help="Spread the layers over the workers of a Dask scheduler.")
@click.option("--include", multiple=True, metavar="GLOB", help="Only layers whose path matches.")
@click.option("--exclude", multiple=True, metavar="GLOB", help="No layer whose path matches.")
@click.option("-o", "--output", default="compressed", show_default=True, type=click.Path(), help="Folder to write.")
@model_options
@compute_options
@cache_option
@online_option
@common
def factorize(shell: Shell, model: str, inputs: tuple[str, ...], arch_args: tuple[str, ...], **options: Any) -> Result:
    """Replace the weights of MODEL by low-rank or product factors.

    MODEL is a state dict (.pt, .pth, .bin, .safetensors), a torch.export program (.pt2), a Hugging Face folder, an
    ONNX file, or, with --trust-pickle, a pickled module. A layer that would not shrink stays dense, and the table says
    why. An ONNX file is factorized in its own graph, by ONNX Runtime and NumPy alone.
    """
    from ..graphs.sniffing import is_onnx

    if is_onnx(Path(model)):
        from ..verbs.factorize_graph import factorize_graph

        for name in ("trust_pickle", "trust_remote_code", "cache", "select"):
            options.pop(name, None)  # nothing of a graph runs code, and a pass through it is not kept
        data, _ = factorize_graph(
            model, inputs=inputs, arch_args=arch_arguments(arch_args), progress=shell.progress, **options
        )
        return Result(data, text=describe(data))
    from ..model import parse_input
    from ..verbs.factorize import factorize as verb

    found = verb(
        model,
        inputs=[parse_input(i) for i in inputs],
        arch_args=arch_arguments(arch_args),
        progress=shell.progress,
        **options,
    )
    return Result(found.data, text=describe(found.data))


def describe(data: dict[str, Any]) -> str:
    """Return the report of a factorization as text."""
    rows = []
    for layer in data["layers"]:
        rank = layer["rank"]
        rows.append(
            [
                layer["name"], layer["form"], "×".join(map(str, layer["shape"])),
                "–" if layer["form"] == "dense" else ("×".join(map(str, rank)) if isinstance(rank, list) else str(rank)),
                f"{layer['params_before']:,}", f"{layer['params_after']:,}",
                "–" if layer["form"] == "dense" else f"{layer['rel_error']:.3f}", layer["reason"] or "",
            ]
        )  # fmt: skip
    header = ["layer", "form", "shape", "rank", "before", "after", "error", "why dense"]
    text = table(header, rows, left=3)
    share = data["params_after"] / data["params_before"] if data["params_before"] else 1.0
    lines = [text, "", f"parameters {data['params_before']:,} → {data['params_after']:,} ({share:.1%})"]
    if data["bytes_before"] is not None and data["bytes_after"] is not None:
        lines.append(f"bytes on disk {human_bytes(data['bytes_before'])} → {human_bytes(data['bytes_after'])}")
    norms = sorted({layer["norm"] for layer in data["layers"] if layer["form"] != "dense"})
    if norms:
        lines.append(f"error: relative, norm {', '.join(norms)}")
    if data["output"]:
        lines.append(f"written to {data['output']}")
    return "\n".join(lines)
