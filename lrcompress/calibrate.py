"""One pass over calibration data: the moments of every layer's input, and of the gradient at its output.

Inputs: centred covariance and mean, merged batch by batch so that no digits cancel; padding positions are left out;
layers that read the same tensor share one accumulator, and a layer that is used twice has the moments of both uses.
Outputs: the Gram matrix of gradients of ⟨y − mean(y), ε⟩ with Gaussian ε, which needs no labels and tells how much
the answer feels an error at that layer. What is read comes from a `LayerView`: modules, a program or an ONNX graph.

    statistics = collect(opened, module, data, layers)
    statistics = measure(OnnxView("model.onnx"), data, layers)
    form("svd").decompose(layer.weight, 16, statistics[layer.name])
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from .data import Data
from .errors import DataError
from .factorize import Statistics
from .metrics import TELLING
from .model import OpenedModel, tensors_of
from .model.surgery import Layer
from .model.views import LayerView, Reading, Walk, patches, view_of
from .progress import Progress, Silent

#: Rows an embedding never saw still weigh this share of the mean row.
_UNSEEN = 0.01
#: A layer with more outputs than this (the head of a language model) has no output moments: they are n×n.
MAX_OUTPUTS = 8192


@dataclass
class Moments:
    """Mean and centred second moment of rows, merged exactly: M₂ ← M₂ᵃ + M₂ᵇ + δδᵀ·NₐN_b/(Nₐ+N_b).

    Rows are (N, n), or (groups, N, n) for a grouped convolution, whose groups read different channels.
    """

    count: int = 0
    mean: Tensor | None = None
    second: Tensor | None = None

    def add(self, rows: Tensor) -> None:
        """Merge rows: products in the dtype of the rows, sums in float64."""
        n = rows.shape[-2]
        if n == 0:
            return
        mean = rows.double().mean(-2)
        centred = rows - mean.unsqueeze(-2).to(rows.dtype)
        # The rounding of the mean to the rows' dtype is taken out again.
        slip = centred.double().mean(-2)
        self.merge(Moments(n, mean, (centred.mT @ centred).double() - n * _outer(slip)))

    def merge(self, other: Moments) -> None:
        """Add what `other` saw; it must not be used afterwards."""
        if other.mean is None or other.second is None:
            return
        if self.mean is None or self.second is None:
            self.count, self.mean, self.second = other.count, other.mean, other.second
            return
        total, delta = self.count + other.count, other.mean - self.mean
        self.second += other.second + _outer(delta) * (self.count * other.count / total)
        self.mean = self.mean + delta * (other.count / total)
        self.count = total

    def copy(self) -> Moments:
        """Return moments that may be merged into."""
        return Moments(self.count, self.mean, None if self.second is None else self.second.clone())


def _outer(v: Tensor) -> Tensor:
    return v.unsqueeze(-1) * v.unsqueeze(-2)


#: Who reads one value: layers (one twice if it does so twice) and, for convolutions, how.
_Readers = tuple[tuple[str, ...], Walk | None]


@dataclass
class _Collected:
    """What all batches gave: moments by who read them, gradients and token counts by layer."""

    inputs: dict[_Readers, Moments] = field(default_factory=dict)
    outputs: dict[str, Tensor] = field(default_factory=dict)
    output_counts: Counter[str] = field(default_factory=Counter)
    tokens: dict[str, Tensor] = field(default_factory=dict)

    def of(self, layer: str) -> list[_Readers]:
        """Return the keys of all moments of a layer, one twice that it read twice at a time."""
        return [key for key in self.inputs for name in key[0] if name == layer]


@dataclass
class _Batch:
    """What one batch gives. A value is held until the end: only then its address tells it from all others."""

    held: dict[tuple[Hashable, Walk | None], tuple[Tensor, Moments, list[str]]] = field(default_factory=dict)

    def add(self, reading: Reading, walk: Walk | None, mask: Tensor | None) -> None:
        key = (reading.key, walk)
        if key not in self.held:
            moments = Moments()
            moments.add(
                _rows(reading.value, mask) if walk is None else _by_group(patches(reading.value, walk), walk.groups)
            )
            self.held[key] = reading.value, moments, []
        self.held[key][2].append(reading.layer)

    def close(self, into: _Collected) -> None:
        """Merge by readers: layers that always read together keep one accumulator between them."""
        for (_, walk), (_, moments, names) in self.held.items():
            into.inputs.setdefault((tuple(sorted(names)), walk), Moments()).merge(moments)


def telling_output(outputs: Mapping[str, Tensor]) -> Tensor:
    """Return the output that stands for the answer: logits, an embedding, or the first one."""
    for name in TELLING:
        if name in outputs:
            return outputs[name]
    return next(iter(outputs.values()))


def collect(
    opened: OpenedModel,
    module: nn.Module,
    data: Data,
    layers: Sequence[Layer],
    *,
    batch_size: int = 32,
    gradient_samples: int = 512,
    seed: int = 0,
    compute: str = "cpu",
    progress: Progress | None = None,
) -> dict[str, Statistics]:
    """Return the statistics of `layers` of a module; the rest is as in `measure`."""
    return measure(
        view_of(opened, module), data, layers, batch_size=batch_size, gradient_samples=gradient_samples, seed=seed,
        compute=compute, progress=progress,
    )  # fmt: skip


def measure(
    view: LayerView,
    data: Data,
    layers: Sequence[Layer],
    *,
    batch_size: int = 32,
    gradient_samples: int = 512,
    seed: int = 0,
    compute: str = "cpu",
    progress: Progress | None = None,
) -> dict[str, Statistics]:
    """Return the statistics of `layers`; `gradient_samples` of the data also serve the output side (0: none).

    Layers that read one input share its `gram` and `mean` as one tensor. A view that is not differentiable gives
    input moments only. Raises `DataError` for data that gives no position or activations that are not finite, and
    `ModelError` for a layer that is not the view's.
    """
    progress = progress or Silent()
    if len(data) == 0:
        raise DataError("calibration data", "at least one sample", "none")
    collected = _Collected()
    generator = torch.Generator().manual_seed(seed)
    samples = used = 0
    device = torch.device(compute)
    with view.on(device), progress.task("calibrate", total=len(data)) as advance:
        for batch in data.batches(batch_size):
            inputs = tensors_of(batch.inputs, device)
            size = len(next(iter(inputs.values())))
            with_gradient = view.differentiable and used < gradient_samples
            _one_batch(view, inputs, layers, collected, generator if with_gradient else None)
            samples, used = samples + size, used + size * with_gradient
            advance(size)
    return _finished(layers, collected, samples)


def _finished(layers: Sequence[Layer], collected: _Collected, samples: int) -> dict[str, Statistics]:
    made: dict[tuple[_Readers, ...], tuple[int, Tensor, Tensor]] = {}
    out = {}
    for layer in layers:
        output = None
        if layer.name in collected.outputs:
            output = (collected.outputs[layer.name] / collected.output_counts[layer.name]).cpu()
        keys = tuple(collected.of(layer.name))
        if layer.name in collected.tokens:
            out[layer.name] = _tokens(collected.tokens[layer.name], output, samples)
        elif not keys or not any(collected.inputs[k].count for k in keys):
            out[layer.name] = Statistics()  # the layer was never reached
        else:
            if keys not in made:
                made[keys] = _moments([collected.inputs[k] for k in keys])
            count, mean, gram = made[keys]
            groups = 1 if gram.dim() == 2 else len(gram)
            out[layer.name] = Statistics(
                gram=gram, mean=mean, output_gram=output, count=count, positions=count / samples, groups=groups
            )
        found = out[layer.name]
        if not all(t is None or bool(torch.isfinite(t).all()) for t in (found.gram, found.output_gram)):
            got = "NaN or infinity"
            raise DataError(
                f"calibration data at layer {layer.name}", "finite activations", got, "check the inputs and their scale"
            )
    return out


def _moments(parts: Sequence[Moments]) -> tuple[int, Tensor, Tensor]:
    """Return count, mean and symmetric covariance of all parts."""
    total = parts[0]
    if len(parts) > 1:
        total = parts[0].copy()
        for part in parts[1:]:
            total.merge(part)
    assert total.mean is not None and total.second is not None
    gram = (total.second / total.count).cpu()
    return total.count, total.mean.cpu(), (gram + gram.mT) / 2


def _tokens(counts: Tensor, output: Tensor | None, samples: int) -> Statistics:
    counts = counts.double().cpu()
    smoothed = counts + _UNSEEN * counts.mean()
    total = int(counts.sum())
    if not total:
        return Statistics()
    return Statistics(row_weights=smoothed / smoothed.sum(), output_gram=output, count=total, positions=total / samples)


def _one_batch(
    view: LayerView,
    inputs: Mapping[str, Tensor],
    layers: Sequence[Layer],
    collected: _Collected,
    generator: torch.Generator | None,
) -> None:
    mask = _mask(inputs)
    by_name = {layer.name: layer for layer in layers}
    batch = _Batch()

    def deliver(reading: Reading) -> None:
        layer = by_name[reading.layer]
        if layer.kind == "embedding":
            _count(collected, layer, reading.value, mask)
        else:
            batch.add(reading, view.walks.get(layer.name), mask)

    outputs: list[tuple[str, Tensor]] = []
    answers = view.read(inputs, list(by_name), deliver, None if generator is None else outputs)
    batch.close(collected)
    answer = telling_output(answers)
    if generator is None or not answer.requires_grad:
        return
    y = answer - answer.mean(-1, keepdim=True) if answer.shape[-1] > 1 else answer
    probe = torch.randn(y.shape, generator=generator).to(y)
    wanted = [(n, t) for n, t in outputs if t.requires_grad and _width(t, view.walks.get(n)) <= MAX_OUTPUTS]
    gradients = torch.autograd.grad((y * probe).sum(), [t for _, t in wanted], allow_unused=True) if wanted else ()
    for (name, _), gradient in zip(wanted, gradients, strict=True):
        if gradient is not None:
            _add_gradient(collected, name, gradient, view.walks.get(name), mask)


def _width(output: Tensor, walk: Walk | None) -> int:
    return output.shape[-1] if walk is None else output.shape[1]


def _add_gradient(collected: _Collected, name: str, gradient: Tensor, walk: Walk | None, mask: Tensor | None) -> None:
    if walk is None:
        rows = _rows(gradient, mask)
    else:  # (batch, out, *space)
        rows = _by_group(gradient.movedim(1, -1).reshape(-1, gradient.shape[1]), walk.groups)
    gram = (rows.mT @ rows).double()
    collected.outputs[name] = collected.outputs[name] + gram if name in collected.outputs else gram
    collected.output_counts[name] += rows.shape[-2]


def _by_group(rows: Tensor, groups: int) -> Tensor:
    """Return rows (N, n) as they are, or as (groups, N, n / groups): channels of a group are neighbours."""
    return rows if groups == 1 else rows.reshape(len(rows), groups, -1).movedim(1, 0)


def _rows(x: Tensor, mask: Tensor | None) -> Tensor:
    """Return (…, n) as rows (N, n), without padding; tokens may be on two axes or on one."""
    if mask is not None and (x.shape[:-1] == mask.shape or x.shape[:-1] == (mask.numel(),)):
        return x[mask] if x.dim() == 3 else x[mask.reshape(-1)]
    return x.reshape(-1, x.shape[-1])


def _mask(inputs: Mapping[str, Tensor]) -> Tensor | None:
    mask = inputs.get("attention_mask")
    return mask.bool() if mask is not None and mask.dim() == 2 else None


def _count(collected: _Collected, layer: Layer, ids: Tensor, mask: Tensor | None) -> None:
    if mask is not None and ids.numel() == mask.numel() and ids.shape in (mask.shape, (mask.numel(),)):
        ids = ids.reshape(-1)[mask.reshape(-1)]
    counts = torch.bincount(ids.reshape(-1), minlength=layer.shape[0])
    collected.tokens[layer.name] = counts + collected.tokens[layer.name] if layer.name in collected.tokens else counts


__all__ = ["Moments", "collect", "measure", "patches", "telling_output"]
