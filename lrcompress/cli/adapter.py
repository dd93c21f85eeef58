"""`lrcompress adapter …`: look at adapters, convert, merge, check and combine them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import click

from .options import arch_arguments, model_options, online_option
from .output import Result, Shell, common, human_bytes, table


@click.group(epilog="Example: lrcompress adapter convert adapters/first --to peft -o first-peft")
def adapter() -> None:
    """Look at adapters, convert them from and to PEFT and LyCORIS, merge, check and combine them.

    An adapter is a folder (ours or PEFT's) or a .safetensors file (LyCORIS, kohya). What needs the layers takes a base:
    a compressed checkpoint, or a model that can be opened as a network.
    """


def _base(path: str | None, options: dict[str, Any]) -> Any:
    """Open the base, taking its options out of `options`."""
    from ..model.inputs import parse_input
    from ..verbs.adapter import open_base

    arch, arch_args, inputs = options.pop("arch"), options.pop("arch_args"), options.pop("inputs")
    trust = {k: options.pop(k) for k in ("trust_pickle", "trust_remote_code")}
    if path is None:
        return None
    specs = tuple(parse_input(i) for i in inputs)
    return open_base(path, arch=arch, arch_args=arch_arguments(arch_args), inputs=specs, **trust)


def _with_base(function: Callable[..., Any]) -> Callable[..., Any]:
    @click.option(
        "--base",
        "base_path",
        type=click.Path(),
        help="The model that the adapter is for: a compressed checkpoint or any model.",
    )
    @model_options
    @online_option
    @functools.wraps(function)
    def wrapped(**options: Any) -> Any:
        return function(**options)

    return wrapped


def _includes(function: Callable[..., Any]) -> Callable[..., Any]:
    return click.option("--include", multiple=True, metavar="GLOB", help="Only layers whose path matches.")(function)


@adapter.command("list", epilog="Example: lrcompress adapter list adapters")
@click.argument("folder", default="adapters", type=click.Path())
@common
def list_(shell: Shell, folder: str) -> Result:
    """List the adapters in FOLDER."""
    from ..verbs.adapter import listing

    d = listing(folder)
    rows = [
        [r["name"], r["error"], "", "", "", ""]
        if "error" in r
        else [r["name"], r["kind"], str(r["layers"]), _ranks(r["ranks"]), f"{r['params']:,}", (r["base"] or "any")[:12]]
        for r in d["adapters"]
    ]
    return Result(
        d, text=table(["name", "kind", "layers", "rank", "numbers", "base"], rows, left=2) if rows else "no adapters"
    )


def _ranks(ranks: list[int]) -> str:
    return str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]}–{ranks[-1]}"


@adapter.command(epilog="Example: lrcompress adapter show adapters/first --base compressed")
@click.argument("path", type=click.Path())
@_with_base
@common
def show(shell: Shell, path: str, base_path: str | None, **options: Any) -> Result:
    """Show the adapter PATH layer by layer; with --base also how large its correction is beside the weight."""
    from ..verbs.adapter import show as verb

    d = verb(path, _base(base_path, options))
    rows = [
        [
            r["name"], r["kind"], "×".join(map(str, r["shape"])), str(r["rank"]), f"{r['scaling']:.4g}", f"{r['params']:,}",
            "–" if r.get("share") is None else f"{100 * r['share']:.2f} %",
        ]
        for r in d["layers"]
    ]  # fmt: skip
    head = f"{d['kind']}, {d['params']:,} numbers, for the base {(d['base'] or 'any')[:12]}"
    return Result(
        d, text=head + "\n" + table(["layer", "kind", "weight", "rank", "scaling", "numbers", "change"], rows, left=3)
    )


@adapter.command(
    epilog="Example: lrcompress adapter convert style.safetensors --base compressed --to native -o adapters/style"
)
@click.argument("path", type=click.Path())
@click.option(
    "--to",
    default="native",
    show_default=True,
    help="native, peft (only what PEFT loads), lycoris (a file), lora; payload or onnx_adapter (files for --exported).",
)
@click.option("--exported", type=click.Path(), help="The exported model whose slots a payload or onnx_adapter fills.")
@click.option("--rank", type=int, help="Cut to this rank, as LoRA; the error is printed per layer.")
@click.option(
    "-o",
    "--output",
    required=True,
    type=click.Path(),
    help="Folder to write, or a file for lycoris, payload, onnx_adapter.",
)
@_includes
@_with_base
@common
def convert(
    shell: Shell,
    path: str,
    base_path: str | None,
    to: str,
    rank: int | None,
    output: str,
    include: tuple[str, ...],
    exported: str | None,
    **options: Any,
) -> Result:
    """Write the adapter PATH in another format. Without --rank nothing is lost, or it is refused."""
    from ..verbs.adapter import convert as verb
    from ..verbs.adapter_out import FORMATS, emit

    if to in FORMATS:
        if rank is not None or include:
            raise click.UsageError(f"--rank and --include cut an adapter; convert it first, then write the {to}")
        base = _base(base_path, options)
        d = emit(path, to=to, exported=exported, output=output, base=None if base is None else base.layer)
        return Result(d, text=f"{len(d['layers'])} layers, {human_bytes(d['bytes'])}, written to {d['output']}")
    d = verb(path, to=to, output=output, base=_base(base_path, options), rank=rank, include=include)
    return Result(d, text=_written(d))


@adapter.command(
    epilog="Example: lrcompress adapter combine adapters/a adapters/b --weight 1 --weight 0.5 -o adapters/both"
)
@click.argument("paths", nargs=-1, required=True, type=click.Path())
@click.option("--weight", "weights", multiple=True, type=float, help="One per adapter, in order  [default: 1 each]")
@click.option("--to", default="native", show_default=True, help="native, peft, lycoris, or lora.")
@click.option("--rank", type=int, help="Cut to this rank; the error is printed per layer.")
@click.option("-o", "--output", required=True, type=click.Path(), help="Folder or file to write.")
@_includes
@_with_base
@common
def combine(shell: Shell, paths: tuple[str, ...], base_path: str | None, **options: Any) -> Result:
    """Write the weighted sum of several adapters as one: stacked exactly, or cut to --rank."""
    from ..verbs.adapter import combine as verb

    base = _base(base_path, options)
    d = verb(paths, base=base, **options)
    return Result(d, text=_written(d))


def _written(d: dict[str, Any]) -> str:
    worst = max(d["layers"], key=lambda r: r["rel_error"])
    lines = [f"{len(d['layers'])} layers, {human_bytes(d['bytes'])}, written to {d['output']}"]
    if worst["rel_error"] > 0:
        rows = [[r["name"], str(r["rank"]), f"{r['rel_error']:.4f}"] for r in d["layers"]]
        lines = [
            table(["layer", "rank", "error"], rows),
            f"largest error {worst['rel_error']:.4f} in {worst['name']}",
            *lines,
        ]
    return "\n".join(lines)


@adapter.command(epilog="Example: lrcompress adapter merge compressed adapters/first -o merged")
@click.argument("compressed", type=click.Path())
@click.argument("paths", nargs=-1, required=True, type=click.Path())
@click.option("--weight", "weights", multiple=True, type=float, help="One per adapter, in order  [default: 1 each]")
@click.option(
    "-o", "--output", required=True, type=click.Path(), help="Checkpoint to write; COMPRESSED stays as it is."
)
@online_option
@common
def merge(shell: Shell, compressed: str, paths: tuple[str, ...], **options: Any) -> Result:
    """Write the checkpoint COMPRESSED with adapters merged into its factors or weights."""
    from ..verbs.adapter import open_base
    from ..verbs.adapter_check import merge as verb

    d = verb(paths, open_base(compressed), **options)
    dense = [r["name"] for r in d["layers"] if r["form"] == "dense" != r["form_before"]]
    lines = [f"merged into {len(d['layers'])} layers" + (f"; dense now: {', '.join(dense)}" if dense else "")]
    return Result(d, text="\n".join([*lines, f"written to {d['output']}"]))


@adapter.command(epilog="Example: lrcompress adapter check compressed adapters/first")
@click.argument("base_path", metavar="BASE", type=click.Path())
@click.argument("path", type=click.Path())
@_includes
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of the inputs.")
@model_options
@online_option
@common
def check(shell: Shell, base_path: str, path: str, include: tuple[str, ...], seed: int, **options: Any) -> Result:
    """Compare, per layer, the adapter PATH beside its layer, merged, and in ONNX Runtime. Exit 5 where they differ."""
    from ..verbs.adapter_check import check as verb

    d = verb(path, _base(base_path, options), include=include, seed=seed, progress=shell.progress)
    rows = [
        [
            r["name"],
            r["kind"],
            r["form"],
            r["route"],
            f"{r['moves']:.3g}",
            f"{r['merged']:.1e}",
            f"{r['runtime']:.1e}",
            "ok" if r["passed"] else "MISS",
        ]
        for r in d["layers"]
    ]
    text = table(["layer", "kind", "form", "by", "moves", "merged", "runtime", ""], rows, left=4)
    return Result(d, text=text, exit_code=0 if d["passed"] else 5)
