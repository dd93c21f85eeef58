"""Adapter slots: graph inputs of symbolic rank whose default, an initializer of rank 0, is exactly the base model.

    y = layer(x) + (x @ A) @ B           A (in, r), B (r, out); an embedding looks up A, (tokens, r)
    y = conv(x) + conv₁ₓ₁(conv_A(x), B)  A (r, in/groups, *k) walks like the layer, B (out, r, 1…)
    y = after(z + (z @ A) @ B)           of kind core, z = before(x) between the factors: A (core, r), B (r, core)

The cores of a grouped convolution's groups are one matrix in blocks: what they ship is put along the diagonal.

Branches are written as products of the activation, never as a rebuilt weight. Groups share the filters of A; a
transposed convolution applies B first and A walks like the layer.
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
import torch.nn.functional as F
from onnx import helper, numpy_helper
from torch import Tensor, nn

from ..adapt import Base, Target
from ..errors import CommandError
from ..factorize import ConvGeometry
from ..factorize._linalg import convolve
from ..model.adapting import every_target
from ..model.surgery import adaptable_layers, wrap_dense

SLOT, CORE_SLOT = "slot", "slot_core"
KINDS = ("lora", "core")
#: Rank while tracing: any number that no real dimension is likely to share.
_TRACE_RANK = 3
#: Ranks that a payload may bring; a layer of more than `R_MAX` rows and columns takes its full rank too.
R_MIN, R_MAX = 0, 256


class SlotAdapter(nn.Module):
    """The branch of one layer; its two tensors become graph inputs."""

    in_core = False
    magnitude = None

    def __init__(self, target: Target, dtype: torch.dtype) -> None:
        super().__init__()
        rows, columns, *kernel = target.shape
        r = _TRACE_RANK
        if not kernel:
            # Of a linear layer (in, r) and (r, out); of an embedding, whose rows are looked up, (tokens, r) and (r, width).
            first, last = (columns, rows) if target.kind == "linear" else (rows, columns)
            a, b = torch.zeros(first, r, dtype=dtype), torch.zeros(r, last, dtype=dtype)
        else:
            a = torch.zeros(r, columns, *kernel, dtype=dtype)
            b = torch.zeros(rows, r, *(1,) * len(kernel), dtype=dtype)
        self.lora_A, self.lora_B = nn.Parameter(a), nn.Parameter(b)

    def correct(self, x: Tensor, target: Target, base: Base | None, plain: Tensor) -> Tensor:
        """Return what is added to the layer's output."""
        if target.kind == "linear":
            return (x @ self.lora_A) @ self.lora_B
        if target.kind == "embedding":
            return F.embedding(x, self.lora_A) @ self.lora_B
        g, once = target.groups, ConvGeometry.default(x.dim() - 2)
        # Tiled, not reshaped: a shape would be traced as the number it has now.
        kernels = self.lora_A if g == 1 else self.lora_A.repeat(g, *(1,) * (x.dim() - 1))
        if target.kind == "conv":
            return convolve(target.apply(x, kernels, g), self.lora_B, once, g)
        first = Target(target.shape, "conv_transpose", once, g, (0,) * (x.dim() - 2))
        return target.apply(first.apply(x, self.lora_B, g), kernels, g)

    def is_whole(self, target: Target, positions: int) -> bool:
        """The branch stands beside the weight, which the runtime keeps as a constant."""
        return False

    def add_to(self, y: Tensor, x: Tensor, target: Target, share: float) -> Tensor:
        return y + self.correct(x, target, None, y)


class CoreSlot(nn.Module):
    """The branch between the factors of one layer."""

    in_core = True

    def __init__(self, target: Target, dtype: torch.dtype) -> None:
        super().__init__()
        n, r, ones = target.core * target.groups, _TRACE_RANK, (1,) * (len(target.shape) - 2)
        self.core_A = nn.Parameter(torch.zeros((r, n, *ones) if ones else (n, r), dtype=dtype))
        self.core_B = nn.Parameter(torch.zeros((n, r, *ones) if ones else (r, n), dtype=dtype))

    def shift(self, z: Tensor, target: Target) -> Tensor:
        """Return what is added to the activation z between the factors."""
        if target.kind in ("linear", "embedding"):
            return (z @ self.core_A) @ self.core_B
        once = ConvGeometry.default(z.dim() - 2)
        return convolve(convolve(z, self.core_A, once), self.core_B, once)


@dataclass(frozen=True)
class SlotLayer:
    """A layer that takes adapters of one kind, and how its two tensors look."""

    layer: str
    kind: str
    target: Target
    dtype: str

    @property
    def symbol(self) -> str:
        prefix = "r_" if self.kind == "lora" else "k_"
        return prefix + re.sub(r"\W", "_", self.layer)

    def manifest(self) -> dict[str, Any]:
        """Return the entry of this layer in the manifest's `slots`."""
        rows, columns, *kernel = self.target.shape
        if self.kind == "core":
            rows = columns = self.target.core * self.target.groups
            kernel = [1] * len(kernel)
        elif self.target.kind == "embedding":
            rows, columns = columns, rows
        r = self.symbol
        shapes = ([r, columns, *kernel], [rows, r, *(1,) * len(kernel)]) if kernel else ([columns, r], [r, rows])
        axes = (0, 1) if kernel else (1, 0)
        tensors = [
            {
                "name": f"{self.layer}.{self.kind}_{ab}",
                "dtype": self.dtype,
                "shape": list(shape),
                "rank_symbol": r,
                "rank_axis": axis,
            }
            for ab, shape, axis in zip("AB", shapes, axes, strict=True)
        ]
        entry = {
            "layer": self.layer,
            "kind": self.kind,
            "op": "conv" if kernel else "linear",
            "tensors": tensors,
            "r_min": R_MIN,
            "r_max": max(R_MAX, min(rows, columns * int(np.prod(kernel)))),
            "default_rank": 0,
        }
        if self.target.kind in ("embedding", "conv_transpose") or self.target.groups > 1:
            entry |= {"layer_kind": self.target.kind, "groups": self.target.groups}
        return entry


def attach_slots(module: nn.Module, include: Sequence[str] = (), kinds: Sequence[str] | None = None) -> list[SlotLayer]:
    """Attach slots of `kinds` (default: all) to the layers that take adapters; return them in the module's order.

    Without `include`, the linear layers and ungrouped convolutions; a pattern also reaches embeddings, grouped and
    transposed convolutions. A core slot goes to every such layer whose factors have a core, grouped or not.
    """
    targets = every_target(module) if include else dict.fromkeys(adaptable_layers(module, cores=True))
    without_lora = set() if include else set(targets) - set(adaptable_layers(module))
    for pattern in include:
        if not any(fnmatchcase(n, pattern) for n in targets):
            raise CommandError(
                "lrcompress export --slot-include",
                "a pattern that matches a layer",
                pattern,
                f"layers are {', '.join(list(targets)[:4])}, …",
            )
    found = []
    for name in targets:
        if include and not any(fnmatchcase(name, p) for p in include):
            continue
        layer = wrap_dense(module, name)
        target, dtype = layer.target, next(iter(layer.factors.values())).dtype
        for kind, key, made in (("lora", SLOT, SlotAdapter), ("core", CORE_SLOT, CoreSlot)):
            if kind in (kinds or KINDS) and (name not in without_lora if kind == "lora" else target.core):
                layer.adapters[key] = made(target, dtype)
                layer.active[key] = 1.0
                found.append(SlotLayer(name, kind, target, str(dtype).removeprefix("torch.")))
    if kinds is not None and "core" in kinds and not any(s.kind == "core" for s in found):
        raise CommandError(
            "lrcompress export --slots", "a layer whose factors have a core", "none", "leave core out, or factorize"
        )
    return found


def make_inputs(graph: onnx.GraphProto, slots: Sequence[dict[str, Any]]) -> None:
    """Turn the traced slot tensors of `graph` into inputs of symbolic rank with a default that changes nothing."""
    for slot in slots:
        for tensor in slot["tensors"]:
            for old in [t for t in graph.initializer if t.name == tensor["name"]]:
                graph.initializer.remove(old)
            empty = [slot["default_rank"] if isinstance(d, str) else d for d in tensor["shape"]]
            default = np.zeros(empty, tensor["dtype"])
            graph.initializer.append(numpy_helper.from_array(default, tensor["name"]))
            kind = helper.np_dtype_to_tensor_dtype(default.dtype)
            graph.input.append(helper.make_tensor_value_info(tensor["name"], kind, tensor["shape"]))
