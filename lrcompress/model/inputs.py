"""What goes into a model: a name, a dtype and a shape whose words are dynamic axes.

    parse_input("x:float32:batch,3,32,32")
    InputSpec(name="x", dtype="float32", shape=("batch", 3, 32, 32))

One word means one size wherever it stands: two inputs that share `sequence` are equally long.
"""

from __future__ import annotations

import difflib
import keyword
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ..errors import CommandError, ModelError

DTYPES = ("float32", "float64", "float16", "int8", "int16", "int32", "int64", "uint8", "bool")
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_.]*")
_WORD = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_SIZE = re.compile(r"[0-9]{1,9}")
_FORM = "NAME:DTYPE:DIMS, for example x:float32:batch,3,32,32"


@dataclass(frozen=True)
class InputSpec:
    """One input; a `str` in `shape` names a dynamic axis."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]

    def __str__(self) -> str:
        """Return the text that `parse_input` reads."""
        return f"{self.name}:{self.dtype}:{','.join(map(str, self.shape))}"

    def as_dict(self) -> dict[str, Any]:
        return {"name": self.name, "dtype": self.dtype, "shape": list(self.shape)}


def parse_input(text: str) -> InputSpec:
    """Read `NAME:DTYPE:DIMS`; no DIMS after the second colon is a scalar. `CommandError` names what is wrong."""
    parts = text.split(":")
    if len(parts) != 3:
        raise CommandError(f"--input {text}", _FORM, f"{len(parts)} parts")
    name, dtype, dims = (p.strip() for p in parts)
    if not _NAME.fullmatch(name):
        raise CommandError(f"--input {text}", "an argument name of the model's forward", repr(name), _FORM)
    if dtype not in DTYPES:
        near = difflib.get_close_matches(dtype, DTYPES, 1)
        raise CommandError(
            f"--input {text}",
            f"a dtype of {', '.join(DTYPES)}",
            repr(dtype),
            f"did you mean {near[0]}?" if near else "",
        )
    return InputSpec(name, dtype, tuple(_axis(text, d.strip()) for d in dims.split(",")) if dims else ())


def _axis(text: str, value: str) -> int | str:
    if _SIZE.fullmatch(value):
        if int(value) == 0:
            raise CommandError(f"--input {text}", "sizes of at least 1", value)
        return int(value)
    if _WORD.fullmatch(value) and not keyword.iskeyword(value):
        return value
    raise CommandError(f"--input {text}", "each axis a positive number or a word", repr(value), _FORM)


def input_from_dict(value: Mapping[str, Any], where: object) -> InputSpec:
    """Read what `InputSpec.as_dict` wrote, as strictly as what a user types."""
    try:
        return parse_input(f"{value['name']}:{value['dtype']}:{','.join(str(d) for d in value['shape'])}")
    except (KeyError, TypeError, CommandError) as e:
        raise ModelError(where, "an input {name, dtype, shape}", value, "the file was edited: make it again") from e


def tensors_of(arrays: Mapping[str, Any], device: torch.device | str = "cpu") -> dict[str, torch.Tensor]:
    """Return arrays as tensors in memory of torch's own: results of BLAS can depend on how their input is aligned."""
    return {k: torch.as_tensor(v).clone().to(device) for k, v in arrays.items()}
