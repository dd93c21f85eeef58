"""Adapter slots: graph inputs of symbolic rank whose default, an initializer of rank 0, is exactly the base model.

    y = layer(x) + (x @ A) @ B           A (in, r), B (r, out)
    y = conv(x) + conv₁ₓ₁(conv_A(x), B)  A (r, in, *k) walks like the layer, B (out, r, 1…)

Branches are written as products of the activation, never as a rebuilt weight.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import numpy as np
import onnx
import torch
from onnx import helper, numpy_helper
from torch import Tensor, nn

from ..errors import CommandError
from ..factorize import ConvGeometry
from ..factorize._linalg import convolve
from ..model.surgery import adaptable_layers, wrap_dense

SLOT = "slot"
#: Rank while tracing: any number that no real dimension is likely to share.
_TRACE_RANK = 3
#: Ranks that a payload may bring.
R_MIN, R_MAX = 0, 256


class SlotAdapter(nn.Module):
    """The branch of one layer; its two tensors become graph inputs."""

    def __init__(self, weight_shape: tuple[int, ...], dtype: torch.dtype) -> None:
        super().__init__()
        self.weight_shape = weight_shape
        out, inner, *kernel = weight_shape
        shape_a = (_TRACE_RANK, inner, *kernel) if kernel else (inner, _TRACE_RANK)
        shape_b = (out, _TRACE_RANK, *(1,) * len(kernel)) if kernel else (_TRACE_RANK, out)
        self.lora_A = nn.Parameter(torch.zeros(shape_a, dtype=dtype))
        self.lora_B = nn.Parameter(torch.zeros(shape_b, dtype=dtype))

    def forward(self, x: Tensor, geometry: ConvGeometry | None = None) -> Tensor:
        if geometry is None:
            return (x @ self.lora_A) @ self.lora_B
        return convolve(convolve(x, self.lora_A, geometry), self.lora_B, ConvGeometry.default(x.dim() - 2))


@dataclass(frozen=True)
class SlotLayer:
    """A layer that takes adapters, and how its two tensors look."""

    layer: str
    op: str
    weight_shape: tuple[int, ...]
    dtype: str

    @property
    def symbol(self) -> str:
        return "r_" + re.sub(r"\W", "_", self.layer)

    def manifest(self) -> dict[str, Any]:
        """Return the entry of this layer in the manifest's `slots`."""
        out, inner, *kernel = self.weight_shape
        r = self.symbol
        shapes = ([r, inner, *kernel], [out, r, *(1,) * len(kernel)]) if kernel else ([inner, r], [r, out])
        axes = (0, 1) if kernel else (1, 0)
        tensors = [
            {
                "name": f"{self.layer}.lora_{ab}",
                "dtype": self.dtype,
                "shape": list(shape),
                "rank_symbol": r,
                "rank_axis": axis,
            }
            for ab, shape, axis in zip("AB", shapes, axes, strict=True)
        ]
        return {
            "layer": self.layer,
            "kind": "lora",
            "op": self.op,
            "tensors": tensors,
            "r_min": R_MIN,
            "r_max": R_MAX,
            "default_rank": 0,
        }


def attach_slots(module: nn.Module, include: Sequence[str] = ()) -> list[SlotLayer]:
    """Attach a slot to every adaptable layer (of those that match `include`); return them in the module's order."""
    names = adaptable_layers(module)
    for pattern in include:
        if not any(fnmatchcase(n, pattern) for n in names):
            raise CommandError(
                "lrcompress export --slot-include",
                "a pattern that matches a layer",
                pattern,
                f"layers are {', '.join(names[:4])}, …",
            )
    found = []
    for name in names:
        if include and not any(fnmatchcase(name, p) for p in include):
            continue
        layer = wrap_dense(module, name)
        dtype = next(iter(layer.factors.values())).dtype
        layer.adapters[SLOT] = SlotAdapter(layer.shape, dtype)
        layer.active[SLOT] = 1.0
        found.append(
            SlotLayer(
                name, "conv" if len(layer.shape) > 2 else "linear", layer.shape, str(dtype).removeprefix("torch.")
            )
        )
    return found


def make_inputs(graph: onnx.GraphProto, slots: Sequence[dict[str, Any]]) -> None:
    """Turn the traced slot tensors of `graph` into inputs of symbolic rank with a rank-0 default."""
    for slot in slots:
        for tensor in slot["tensors"]:
            for old in [t for t in graph.initializer if t.name == tensor["name"]]:
                graph.initializer.remove(old)
            default = np.zeros([0 if isinstance(d, str) else d for d in tensor["shape"]], tensor["dtype"])
            graph.initializer.append(numpy_helper.from_array(default, tensor["name"]))
            kind = helper.np_dtype_to_tensor_dtype(default.dtype)
            graph.input.append(helper.make_tensor_value_info(tensor["name"], kind, tensor["shape"]))
