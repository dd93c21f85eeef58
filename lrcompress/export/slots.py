"""Adapter slots: graph inputs of symbolic rank whose default, an initializer of rank 0, is exactly the base model.

    y = layer(x) + (x @ A) @ B           A (in, r), B (r, out); an embedding looks up A, (tokens, r)
    y = conv(x) + conv₁ₓ₁(conv_A(x), B)  A (r, in/groups, *k) walks like the layer, B (out, r, 1…)
    y = s·layer(x) + (x @ A) @ B + b     of kind dora, layer without bias: s (out,), ones by default, is folded into B
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

SLOT, CORE_SLOT, DORA_SLOT = "slot", "slot_core", "slot_dora"
#: What is wired unless other kinds are asked for, and what there is.
KINDS = ("lora", "core")
ALL_KINDS = (*KINDS, "dora")
#: Rank while tracing: any number that no real dimension is likely to share.
_TRACE_RANK = 3
#: Ranks that a payload may bring; a layer of more than `R_MAX` rows and columns takes its full rank too.
R_MIN, R_MAX = 0, 256


class SlotAdapter(nn.Module):
    """The branch of one layer; its two tensors become graph inputs."""

    in_core = False
    magnitude = None
    kind = "lora"

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
        for name, value in zip("AB", (a, b), strict=True):
            self.register_parameter(f"{self.kind}_{name}", nn.Parameter(value))

    def correct(self, x: Tensor, target: Target, base: Base | None, plain: Tensor) -> Tensor:
        """Return what is added to the layer's output."""
        a: Tensor = getattr(self, f"{self.kind}_A")
        b: Tensor = getattr(self, f"{self.kind}_B")
        if target.kind == "linear":
            return (x @ a) @ b
        if target.kind == "embedding":
            return F.embedding(x, a) @ b
        g, once = target.groups, ConvGeometry.default(x.dim() - 2)
        # Tiled, not reshaped: a shape would be traced as the number it has now.
        kernels = a if g == 1 else a.repeat(g, *(1,) * (x.dim() - 1))
        if target.kind == "conv":
            return convolve(target.apply(x, kernels, g), b, once, g)
        first = Target(target.shape, "conv_transpose", once, g, (0,) * (x.dim() - 2))
        return target.apply(first.apply(x, b, g), kernels, g)

    def is_whole(self, target: Target, positions: int) -> bool:
        """The branch stands beside the weight, which the runtime keeps as a constant."""
        return False

    def add_to(self, y: Tensor, x: Tensor, target: Target, share: float) -> Tensor:
        return y + self.correct(x, target, None, y)


class DoraSlot(SlotAdapter):
    """The branch of one layer whose outputs are scaled, too, as weight-decomposed adapters do."""

    kind = "dora"

    def __init__(self, target: Target, dtype: torch.dtype) -> None:
        super().__init__(target, dtype)
        self.dora_s = nn.Parameter(torch.ones(target.shape[target.output_axis], dtype=dtype))

    def correct(self, x: Tensor, target: Target, base: Base | None, plain: Tensor) -> Tensor:
        more = self.dora_s - 1
        if target.kind == "conv":
            more = more.reshape(-1, *(1,) * (x.dim() - 2))
        return more * plain + super().correct(x, target, base, plain)


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
        prefix = {"lora": "r_", "core": "k_", "dora": "d_"}[self.kind]
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
        entry: dict[str, Any] = {
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
        if self.kind == "dora":
            entry["scale"] = {"name": f"{self.layer}.dora_s", "dtype": self.dtype, "shape": [rows]}
        return entry


_MADE: dict[str, tuple[str, type[SlotAdapter] | type[CoreSlot]]] = {
    "lora": (SLOT, SlotAdapter),
    "core": (CORE_SLOT, CoreSlot),
    "dora": (DORA_SLOT, DoraSlot),
}
#: What a kind that was asked for needs, and what to do without it.
_NEEDS = (
    ("core", "a layer whose factors have a core", "leave core out, or factorize"),
    ("dora", "a layer whose outputs a vector scales: linear, convolution or embedding", "leave dora out"),
)


def attach_slots(module: nn.Module, include: Sequence[str] = (), kinds: Sequence[str] | None = None) -> list[SlotLayer]:
    """Attach slots of `kinds` (default: `KINDS`) to the layers that take adapters; return them in the module's order.

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
        places = {"lora": name not in without_lora, "core": target.core > 0}
        # A transposed convolution's outputs lie across the groups of its weight: no vector scales them.
        places["dora"] = places["lora"] and target.kind != "conv_transpose"
        for kind, (key, made) in _MADE.items():
            if kind in (kinds or KINDS) and places[kind]:
                layer.adapters[key] = made(target, dtype)
                layer.active[key] = 1.0
                found.append(SlotLayer(name, kind, target, str(dtype).removeprefix("torch.")))
    for kind, expected, remedy in _NEEDS:
        if kinds is not None and kind in kinds and not any(s.kind == kind for s in found):
            raise CommandError("lrcompress export --slots", expected, "none", remedy)
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
        if "scale" in slot:  # the traced ones are the default already
            scale = slot["scale"]
            kind = helper.np_dtype_to_tensor_dtype(np.dtype(scale["dtype"]))
            graph.input.append(helper.make_tensor_value_info(scale["name"], kind, scale["shape"]))
