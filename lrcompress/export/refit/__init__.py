"""Closed-form refits of quantized weights: what rounding costs is made up for before anything is written.

    found = refit(model, products, grids, seen)
    found.coded["layer.U"]        codes and scales of a weight; found.arrays: the values of weights and biases

Layer by layer, in the order of the graph:

1. two factors with nothing between them take the gauge in which they round best (`gauges`), by measured error;
2. the first is rounded with its errors fed forward in the metric of its inputs (`gptq`);
3. the second is fitted again to what the rounded first makes of the data (`joint`), and rounded the same way;
4. the bias takes what is left of the mean.

Without calibration data every metric is the identity, and what remains is the gauge and the best scales.

Source: maths of GPTQ (arXiv 2210.17323), incoherence (arXiv 2307.13304) and ordinary least squares, put together.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx
import torch
from torch import Tensor

from ..products import Product, array_of, readers
from .gauges import orthonormal, rounding, step
from .gptq import quantize
from .grids import Coded, Grid
from .joint import Joint, lost, refitted
from .moments import Seen, Walk

#: Rows of a table that are rounded to compare gauges.
_TRIED = 4096
GAUGES = ("as it is", "orthonormal", "rotated")


@dataclass(frozen=True)
class Rounded:
    """What rounding did to one weight. `rel_error`: of its outputs on calibration data (of itself, without)."""

    weight: str
    bits: int
    rel_error: float
    gauge: str


@dataclass
class Refit:
    """`coded`: the weights on their grids; `arrays`: values for the graph, biases included; `rows`: a report."""

    coded: dict[str, Coded] = field(default_factory=dict)
    arrays: dict[str, np.ndarray] = field(default_factory=dict)
    rows: list[Rounded] = field(default_factory=list)


def refit(
    model: onnx.ModelProto, products: Sequence[Product], grids: Mapping[str, Grid], seen: Mapping[str, Seen],
    *, counts: Mapping[str, np.ndarray] | None = None, rounds_activations: bool = False,
) -> Refit:  # fmt: skip
    """Return the weights of `grids` rounded and refitted; other products keep theirs, but carry the drift along.

    `seen`: the inputs of products; `counts`: how often each row of a table was looked up. `rounds_activations`: the
    runtime rounds what the products read to int8 as well, which the choice of gauge then counts.
    """
    return _Pass(model, products, grids, seen, counts or {}, rounds_activations).run()


def round_only(model: onnx.ModelProto, products: Sequence[Product], grids: Mapping[str, Grid]) -> Refit:
    """Return the weights of `grids` rounded to the nearest, each by itself: what there is to compare a refit with."""
    found = Refit()
    for p in products:
        if p.weight in grids:
            w = torch.from_numpy(np.array(p.rows(array_of(model.graph, p.weight)), dtype=np.float64))
            coded = found.coded[p.weight] = quantize(w, grids[p.weight])
            found.arrays[p.weight] = p.array(coded.values().numpy())
    return found


class _Pass:
    """One walk over the graph."""

    def __init__(
        self, model: onnx.ModelProto, products: Sequence[Product], grids: Mapping[str, Grid], seen: Mapping[str, Seen],
        counts: Mapping[str, np.ndarray], rounds: bool,
    ) -> None:  # fmt: skip
        self.graph, self.products, self.grids, self.seen = model.graph, list(products), grids, seen
        self.counts, self.rounds = counts, rounds
        self.nodes = {o: n for n in self.graph.node for o in n.output}
        self.weights = {p.weight: self._rows(p) for p in products}
        self.joints: dict[str, Joint] = {}
        self.found = Refit()

    def _rows(self, p: Product) -> Tensor:
        return torch.from_numpy(np.array(p.rows(array_of(self.graph, p.weight)), dtype=np.float64))

    def run(self) -> Refit:
        done: set[str] = set()
        for p in self.products:
            if p.weight in done:
                continue
            second = self._rotatable(p)
            if second is not None:
                self._pair(p, second)
                done |= {p.weight, second.weight}
            else:
                self._single(p)
                done.add(p.weight)
        return self.found

    # one product ---------------------------------------------------------------------------------------------------

    def _single(self, p: Product, gauge: str = GAUGES[0]) -> None:
        coded, joint, error = self._round(p, self.weights[p.weight], self._joint(p))
        self._keep(p, coded, error, gauge)
        self._carry(p, self.weights[p.weight], coded, joint)

    def _round(self, p: Product, w: Tensor, joint: Joint | None) -> tuple[Coded | None, Joint | None, float]:
        """Return the codes of `w`, the moments it was fitted to, and the relative error; no codes where none are asked."""
        grid = self.grids.get(p.weight)
        centred = joint.centred() if joint is not None and self._bias(p) is not None else joint
        if grid is None:
            return None, joint, 0.0
        if centred is None:
            coded = quantize(w, grid)
            difference = (coded.values().double() - w).square().sum()
            return coded, joint, float((difference / w.square().sum().clamp_min(1e-300)).sqrt())
        parts, loss, whole = [], 0.0, 0.0
        for i, rows in enumerate(w.chunk(p.groups)):
            s, c, g = centred.group(i)
            target = refitted(rows, c, g) if centred.drifted else rows
            parts.append(quantize(target, grid, g))
            mine = lost(rows, parts[-1].values(), s, c, g)
            loss, whole = loss + mine[0], whole + mine[1]
        coded = Coded(
            grid, torch.cat([q.codes for q in parts]), torch.cat([q.scales for q in parts]), torch.cat([q.zeros for q in parts])
        )  # fmt: skip
        return coded, joint, (loss / whole) ** 0.5 if whole > 0 else 0.0

    def _keep(self, p: Product, coded: Coded | None, error: float, gauge: str) -> None:
        if coded is None:
            if gauge != GAUGES[0]:
                self.found.arrays[p.weight] = p.array(self.weights[p.weight].numpy().astype(np.float32))
            return
        self.found.coded[p.weight] = coded
        self.found.arrays[p.weight] = p.array(coded.values().numpy())
        self.found.rows.append(Rounded(p.weight, coded.grid.bits, error, gauge))

    def _carry(self, p: Product, w: Tensor, coded: Coded | None, joint: Joint | None) -> None:
        """Hand the drift to who reads the output, and the mean of it to the bias."""
        q = w if coded is None else coded.values().double()
        bias = self._bias(p)
        if bias is not None and joint is not None and (coded is not None or joint.drifted):
            shift = torch.cat(
                [a @ joint.mean[i] - b @ joint.mean_hat[i] for i, (a, b) in enumerate(zip(w.chunk(p.groups), q.chunk(p.groups), strict=True))]
            )  # fmt: skip
            old = self.found.arrays.get(bias, array_of(self.graph, bias))
            self.found.arrays[bias] = (old.astype(np.float64) + shift.numpy().reshape(old.shape)).astype(np.float32)
        if self._has_bias(p) or (coded is None and (joint is None or not joint.drifted)):
            return
        if p.kind == "table":
            self.joints[p.output] = self._looked_up(p, w, q)
        elif joint is not None and p.kind in ("matmul", "gemm"):
            self.joints[p.output] = joint.through(w, q)
        elif joint is not None and p.kind == "conv" and joint.clean is not None and joint.rounded is not None:
            walk = Walk.of(self.nodes[p.output], p.shape)
            assert walk is not None
            a, b = (torch.from_numpy(p.array(v.numpy().astype(np.float32))) for v in (w, q))
            z = joint.clean
            self.joints[p.output] = Joint(
                joint.s, joint.c, joint.g, joint.mean, joint.mean_hat, walk.run(z, a), walk.run(joint.rounded, b)
            )  # fmt: skip

    def _looked_up(self, p: Product, w: Tensor, q: Tensor) -> Joint:
        """Return the moments of the rows as they were looked up; one in ten is one that was never seen."""
        seen = torch.from_numpy(self.counts.get(p.weight, np.zeros(p.shape[0]))).double()
        count = seen + max(float(seen.sum()) / 9, 1.0) / len(seen)
        count = count[self._frequent(p)] if len(w) < len(count) else count
        share = (count / count.sum().clamp_min(1e-300))[:, None]
        s, c, g = ((share * a).T @ b for a, b in ((w, w), (w, q), (q, q)))
        return Joint(s[None], c[None], g[None], (share * w).sum(0)[None], (share * q).sum(0)[None])

    def _frequent(self, p: Product) -> Tensor:
        """Return the rows of a table that gauges are tried on: all, or those that are looked up most."""
        if p.shape[0] <= _TRIED:
            return torch.arange(p.shape[0])
        seen = self.counts.get(p.weight, np.zeros(p.shape[0]))
        return torch.from_numpy(np.argsort(-seen, kind="stable")[:_TRIED].copy())

    def _joint(self, p: Product) -> Joint | None:
        """Return the moments of what `p` reads: those of the chain it stands in, or of the data."""
        chained = self.joints.get(p.source)
        if chained is not None and p.kind == "conv":
            walk = Walk.of(self.nodes[p.output], p.shape)
            if walk is None or chained.clean is None or chained.rounded is None:
                return None
            return Joint.of_samples(chained.clean, chained.rounded, walk)
        if chained is not None:
            return chained
        return Joint.root(self.seen[p.weight]) if p.weight in self.seen else None

    # two factors ---------------------------------------------------------------------------------------------------

    def _rotatable(self, first: Product) -> Product | None:
        """Return the product that alone reads what `first` makes, where the space between them is free to turn."""
        if first.groups > 1 or self._has_bias(first) or first.kind == "conv_transpose":
            return None
        found = [p for p in self.products if p.source == first.output]
        outside = {o.name for o in self.graph.output}
        if len(found) != 1 or len(readers(self.graph, first.output)) != 1 or first.output in outside:
            return None
        second = found[0]
        alike = (second.kind == "conv") == (first.kind == "conv") and second.kind in ("matmul", "gemm", "conv")
        turned = {first.weight, second.weight} & set(self.grids)
        return second if alike and second.groups == 1 and turned else None

    def _pair(self, first: Product, second: Product) -> None:
        """Round both in the gauge that measures best."""
        v, u = self.weights[first.weight], self.weights[second.weight]
        table = first.kind == "table"
        flat = v.T if table else v
        taps = u.reshape(len(u), len(flat), -1)
        best: tuple[float, str, tuple[Tensor, Tensor]] | None = None
        for gauge in GAUGES:
            turned = (flat, taps) if gauge == GAUGES[0] else orthonormal(flat, taps, rotate=gauge == GAUGES[2])
            if turned is None:
                continue
            pair = (turned[0].T if table else turned[0]), turned[1].reshape(u.shape)
            tried = (pair[0][self._frequent(first)], pair[1]) if table else pair
            loss = self._trial(first, second, tried)
            if best is None or loss < best[0]:
                best = loss, gauge, pair
        assert best is not None
        self.weights[first.weight], self.weights[second.weight] = best[2]
        for p in (first, second):
            self._single(p, best[1])

    def _trial(self, first: Product, second: Product, pair: tuple[Tensor, Tensor]) -> float:
        """Return the share of the pair's output that rounding both would lose."""
        kept = self.weights[first.weight], self.weights[second.weight], self.found, dict(self.joints)
        self.weights[first.weight], self.weights[second.weight] = pair
        self.found = Refit()
        joint = self._joint(first)
        coded, joint, alone = self._round(first, pair[0], joint)
        self._carry(first, pair[0], coded, joint)
        middle = self._joint(second)
        end, middle, error = self._round(second, pair[1], middle)
        loss = error**2 if end is not None else alone**2
        if self.rounds and middle is not None:
            q = pair[1] if end is None else end.values().double()
            whole = float(((pair[1] @ middle.s[0]) * pair[1]).sum())
            walk_input = self.joints[first.output].rounded if first.output in self.joints else None
            noise = rounding(q, step(walk_input, middle.g))
            loss += noise / whole if whole > 0 else 0.0
        self.weights[first.weight], self.weights[second.weight], self.found, self.joints = kept
        return loss

    # biases --------------------------------------------------------------------------------------------------------

    def _has_bias(self, p: Product) -> bool:
        return len(self.nodes[p.output].input) > 2 and p.kind != "table"

    def _bias(self, p: Product) -> str | None:
        """Return the constant that is added to the output, and to nothing else: it may take a mean."""
        node, constants = self.nodes[p.output], {t.name for t in self.graph.initializer}
        free = constants - {i.name for i in self.graph.input}
        if p.kind == "table":
            return None
        if len(node.input) > 2:
            name = node.input[2]
        else:
            added = readers(self.graph, p.output)
            if len(added) != 1 or added[0].op_type != "Add":
                return None
            name = next(i for i in added[0].input if i != p.output) if len(set(added[0].input)) == 2 else ""
        if name not in free or len(readers(self.graph, name)) != 1:
            return None
        shape = array_of(self.graph, name).shape
        rows = len(self.weights[p.weight])
        fits = int(np.prod(shape)) == rows and (shape[-1] == rows if p.kind != "conv" else True)
        return name if fits else None
