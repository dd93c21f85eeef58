"""What a pass has seen so far: accumulators, how a batch is merged into them, and their state as tensors.

    collected = Collected()
    batch = collected.batch(layers, walks, mask)
    view.read(inputs, names, batch.deliver)
    batch.close()
    statistics = collected.finished(layers, samples)
    tensors, record = collected.state()                     # and back: Collected.of_state(tensors, record)

Accumulators are kept per *distinct* input: layers that always read one value together share one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..errors import DataError
from ..factorize import Statistics, shrunk
from ..model.surgery import Layer
from ..model.views import Reading, Walk
from ..threads import apart
from .moments import Moments, gram
from .patch_moments import by_group, patch_moments

#: Rows an embedding never saw still weigh this share of the mean row.
_UNSEEN = 0.01

#: Who reads one value: layers (one twice if it does so twice) and, for convolutions, how.
Readers = tuple[tuple[str, ...], Walk | None]


@dataclass
class Collected:
    """What all batches gave: moments by who read them, gradients and token counts by layer."""

    inputs: dict[Readers, Moments] = field(default_factory=dict)
    outputs: dict[str, Tensor] = field(default_factory=dict)
    output_counts: Counter[str] = field(default_factory=Counter)
    tokens: dict[str, Tensor] = field(default_factory=dict)

    def batch(self, layers: Sequence[Layer], walks: Mapping[str, Walk], mask: Tensor | None) -> Reader:
        """Return what reads one batch; `mask` (batch, tokens) is True at real positions."""
        return Reader(self, {layer.name: layer for layer in layers}, walks, mask)

    def add_gradient(self, name: str, gradient: Tensor, walk: Walk | None, mask: Tensor | None) -> None:
        """Add the Gram matrix of a gradient at a layer's output: (…, out), or (batch, out, *space)."""
        if walk is None:
            rows = real_rows(gradient, mask)
        else:
            rows = by_group(gradient.movedim(1, -1).reshape(-1, gradient.shape[1]), walk.groups)
        found = gram(rows if rows.dtype == torch.float64 else rows.float())
        self.outputs[name] = self.outputs[name].add_(found) if name in self.outputs else found
        self.output_counts[name] += rows.shape[-2]

    def finished(self, layers: Sequence[Layer], samples: int) -> dict[str, Statistics]:
        """Return the statistics of every layer; layers that read the same share `gram` and `mean` as one tensor.

        What was collected becomes the statistics where it can: it must not be used afterwards.
        """
        users = Counter(key for key in self.inputs for _ in {self._read_by(name) for name in key[0]})
        made: dict[tuple[Readers, ...], tuple[int, Tensor, Tensor]] = {}
        out = {}
        for layer in layers:
            output = None
            if layer.name in self.outputs:
                count = self.output_counts[layer.name]
                output = shrunk(self.outputs.pop(layer.name).div_(count).cpu(), count)
            keys = self._read_by(layer.name)
            if layer.name in self.tokens:
                out[layer.name] = _of_tokens(self.tokens[layer.name], output, samples)
            elif not keys or not any(self.inputs[k].count for k in keys):
                out[layer.name] = Statistics()  # the layer was never reached
            else:
                if keys not in made:
                    last = len(keys) == 1 and users[keys[0]] == 1
                    count, mean, second = _covariance([self.inputs[k] for k in keys], last=last)
                    made[keys] = count, mean, shrunk(second, count)
                count, mean, second = made[keys]
                groups = 1 if second.dim() == 2 else len(second)
                out[layer.name] = Statistics(
                    gram=second, mean=mean, output_gram=output, count=count, positions=count / samples, groups=groups
                )
            _check_finite(layer.name, out[layer.name])
        return out

    def _read_by(self, layer: str) -> tuple[Readers, ...]:
        """Return the keys of all moments of a layer, one twice that it read twice at a time."""
        return tuple(key for key in self.inputs for name in key[0] if name == layer)

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return everything as named tensors and a JSON record."""
        tensors: dict[str, Tensor] = {}
        rows = []
        for i, ((names, walk), moments) in enumerate(self.inputs.items()):
            rows.append({"names": list(names), "walk": None if walk is None else asdict(walk), "count": moments.count})
            if moments.mean is not None and moments.second is not None:
                tensors |= {f"input.{i}.mean": moments.mean, f"input.{i}.second": moments.second}
        tensors |= {f"output.{name}": t for name, t in self.outputs.items()}
        tensors |= {f"tokens.{name}": t for name, t in self.tokens.items()}
        return tensors, {"inputs": rows, "output_counts": dict(self.output_counts)}

    @classmethod
    def of_state(cls, tensors: Mapping[str, Tensor], record: Mapping[str, Any], device: torch.device) -> Collected:
        """Return what `state` described, on `device`."""
        held = {name: t.to(device) for name, t in tensors.items()}
        out = cls(output_counts=Counter(record["output_counts"]))
        for i, row in enumerate(record["inputs"]):
            walk = None if row["walk"] is None else _walk(row["walk"])
            moments = Moments(row["count"], held.get(f"input.{i}.mean"), held.get(f"input.{i}.second"))
            out.inputs[tuple(row["names"]), walk] = moments
        for name, t in held.items():
            kind, _, layer = name.partition(".")
            if kind in ("output", "tokens"):
                (out.outputs if kind == "output" else out.tokens)[layer] = t
        return out


@dataclass
class Reader:
    """What one batch gives. A value is held until the end: only then its address tells it from all others."""

    into: Collected
    layers: Mapping[str, Layer]
    walks: Mapping[str, Walk]
    mask: Tensor | None
    #: What failed while a value was looked at, as against what the network could not run.
    fault: Exception | None = None
    _held: dict[tuple[Hashable, Walk | None], tuple[Tensor, Moments, list[str]]] = field(default_factory=dict)

    def deliver(self, reading: Reading) -> None:
        """Take what a layer reads, before the network can change it."""
        try:
            layer = self.layers[reading.layer]
            if layer.kind == "embedding":
                self._count(layer, reading.value)
            else:
                with apart(layer.columns):
                    self._add(reading, self.walks.get(layer.name))
        except Exception as e:
            self.fault = e
            raise

    def close(self) -> None:
        """Merge by readers: layers that always read together keep one accumulator between them."""
        for (_, walk), (_, moments, names) in self._held.items():
            self.into.inputs.setdefault((tuple(sorted(names)), walk), Moments()).merge(moments)

    def _add(self, reading: Reading, walk: Walk | None) -> None:
        key = (reading.key, walk)
        if key not in self._held:
            moments = Moments()
            if walk is None:
                moments.add(real_rows(reading.value, self.mask))
            else:
                moments = patch_moments(reading.value, walk)
            self._held[key] = reading.value, moments, []
        self._held[key][2].append(reading.layer)

    def _count(self, layer: Layer, ids: Tensor) -> None:
        if (
            self.mask is not None
            and ids.numel() == self.mask.numel()
            and ids.shape in (self.mask.shape, (self.mask.numel(),))
        ):
            ids = ids.reshape(-1)[self.mask.reshape(-1)]
        counts = torch.bincount(ids.reshape(-1), minlength=layer.shape[0])
        tokens = self.into.tokens
        tokens[layer.name] = counts + tokens[layer.name] if layer.name in tokens else counts


def real_rows(x: Tensor, mask: Tensor | None) -> Tensor:
    """Return (…, n) as rows (N, n), without padding; tokens may be on two axes or on one."""
    if mask is not None and (x.shape[:-1] == mask.shape or x.shape[:-1] == (mask.numel(),)):
        return x[mask] if x.dim() == 3 else x[mask.reshape(-1)]
    return x.reshape(-1, x.shape[-1])


def _walk(row: Mapping[str, Any]) -> Walk:
    """Return a walk from JSON, which knows no tuples."""
    axes = {k: tuple(row[k]) for k in ("kernel", "stride", "dilation")}
    return Walk(**{**row, **axes, "pads": tuple((a, b) for a, b in row["pads"])})


def _covariance(parts: Sequence[Moments], *, last: bool) -> tuple[int, Tensor, Tensor]:
    """Return count, mean and symmetric covariance of all parts; `last`: the first one may be overwritten."""
    total = parts[0] if last else parts[0].copy()
    for part in parts[1:]:
        total.merge(part)
    assert total.mean is not None and total.second is not None
    second = total.second.div_(total.count).cpu()
    return total.count, total.mean.cpu(), (second + second.mT).div_(2)


def _of_tokens(counts: Tensor, output: Tensor | None, samples: int) -> Statistics:
    counts = counts.double().cpu()
    smoothed = counts + _UNSEEN * counts.mean()
    total = int(counts.sum())
    if not total:
        return Statistics()
    return Statistics(row_weights=smoothed / smoothed.sum(), output_gram=output, count=total, positions=total / samples)


def _check_finite(name: str, found: Statistics) -> None:
    if not all(t is None or bool(torch.isfinite(t).all()) for t in (found.gram, found.output_gram)):
        got = "NaN or infinity"
        raise DataError(
            f"calibration data at layer {name}", "finite activations", got, "check the inputs and their scale"
        )
