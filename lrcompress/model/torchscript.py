"""TorchScript: converted to a `torch.export` program, then opened like any other.

A TorchScript archive is code: it is loaded only where the caller trusts it. It does not tell its inputs, so they must
be given; a word among their sizes stays a free axis of the program.
"""

from __future__ import annotations

import contextlib
import logging
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ModelError
from .inputs import InputSpec
from .opened import OpenedModel
from .programs import open_program

_EXPECTED = "a TorchScript program that torch can convert"
_REMEDY = "export its source with torch.export, or give its state dict with --arch"


def open_torchscript(path: Path, inputs: Sequence[InputSpec]) -> OpenedModel:
    """Load a trusted archive, which runs its code, and convert it. Raises `ModelError` in one line where that fails."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            module = torch.jit.load(path, map_location="cpu")  # type: ignore[no-untyped-call]
    except Exception as e:  # trusted code may raise anything
        raise ModelError(path, "a readable TorchScript archive", _reason(e), "fetch it again") from e
    opened = convert(module, inputs, path)
    opened.path = path
    return opened


def convert(module: torch.jit.ScriptModule, inputs: Sequence[InputSpec], where: object) -> OpenedModel:
    """Return a script module as a program whose layers are modules; its weights and outputs stay the same."""
    if not inputs:
        raise ModelError(
            where, "the model's inputs", "TorchScript, which does not tell them", "give --input NAME:DTYPE:DIMS"
        )
    module.eval()
    specs = _in_order(module, inputs, where)
    try:
        with warnings.catch_warnings(), _silent():
            warnings.simplefilter("ignore")
            program = _converter(module, specs).convert()
            with tempfile.TemporaryDirectory() as folder:
                # Through a file, so that it is checked and held like a program that came as one.
                torch.export.save(program, Path(folder) / "converted.pt2")
                opened = open_program(Path(folder) / "converted.pt2")
    except ModelError as e:
        raise ModelError(where, _EXPECTED, f"{e.expected} expected, {e.got}", _REMEDY) from e
    except Exception as e:  # the converter is young and raises whatever it stumbles over
        raise ModelError(where, _EXPECTED, _reason(e), _REMEDY) from e
    opened.kind, opened.inputs = "torchscript", specs
    return opened


def _converter(module: torch.jit.ScriptModule, specs: Sequence[InputSpec]) -> Any:
    from torch._export.converter import TS2EPConverter

    args = tuple(_example(s) for s in specs)
    shapes = tuple({i: torch.export.Dim.AUTO for i, d in enumerate(s.shape) if isinstance(d, str)} for s in specs)

    class Converter(TS2EPConverter):
        """Torch's converter, told which axes are free and what the inputs are called; lifted constants are tensors."""

        def retrace_as_exported_program(self, gm: torch.fx.GraphModule, name_to_constant: dict[str, Any]) -> Any:
            placeholders = [n for n in gm.graph.nodes if n.op == "placeholder"]
            for node, spec in zip(placeholders, specs, strict=True):
                node._rename(spec.name)
                node.target = spec.name
            gm.recompile()
            _as_parameters(gm, {n for n, _ in module.named_parameters(remove_duplicate=False)})
            return torch.export.export(gm, args, dynamic_shapes=shapes, strict=False)

    return Converter(module, args)


def _as_parameters(gm: torch.fx.GraphModule, names: set[str]) -> None:
    """Make parameters of what came out of the archive as plain tensors; tied ones stay one."""
    made: dict[tuple[object, ...], nn.Parameter] = {}
    for name, value in list(gm.named_buffers(remove_duplicate=False)):
        holder, _, key = name.rpartition(".")
        owner = gm.get_submodule(holder)
        if name in names:
            del owner._buffers[key]
            place = (value.data_ptr(), tuple(value.shape), value.stride())
            owner._parameters[key] = made.setdefault(place, nn.Parameter(value.detach()))
        else:
            owner._buffers[key] = value.detach()


def _in_order(module: torch.jit.ScriptModule, inputs: Sequence[InputSpec], where: object) -> tuple[InputSpec, ...]:
    """Return the inputs in the order of forward's arguments, by name, or as they come where no name fits."""
    forward: Any = module.forward
    names = [a.name for a in forward.schema.arguments if a.name != "self"]
    by_name = {s.name: s for s in inputs}
    if set(by_name) <= set(names):
        found = tuple(by_name[n] for n in names if n in by_name)
        if [s.name for s in found] == names[: len(found)]:
            return found
    elif len(inputs) == len(names) and not set(by_name) & set(names):
        return tuple(inputs)
    raise ModelError(
        where, f"inputs named {', '.join(names)}", ", ".join(by_name), "name them with --input as forward does"
    )


def _example(spec: InputSpec) -> Tensor:
    """Return ones of the declared shape; a free axis gets a size that is neither 0 nor 1 nor equal to its neighbours'."""
    sizes = [d if isinstance(d, int) else 3 + 2 * i for i, d in enumerate(spec.shape)]
    return torch.ones(sizes, dtype=getattr(torch, spec.dtype))


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Keep what the converter reports to its developers to itself."""
    level = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        yield
    finally:
        logging.disable(level)


def _reason(e: BaseException) -> str:
    lines = [line.strip() for line in str(e).splitlines() if line.strip()]
    return f"{type(e).__name__}: {lines[0] if lines else ''}"
