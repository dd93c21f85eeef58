"""One pass over calibration data: the moments of every layer's input, and of the gradient at its output.

Inputs: centred covariance and mean, merged batch by batch so that no digits cancel; padding positions are left out;
layers that read the same tensor share one accumulator. Outputs: the Gram matrix of gradients of ⟨y − mean(y), ε⟩
with Gaussian ε, which needs no labels and tells how much the answer feels an error at that layer.

    statistics = collect(opened, module, data, layers)
    form("svd").decompose(layer.weight, 16, statistics[layer.name])
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .data import Data
from .errors import DataError
from .factorize import Statistics
from .metrics import TELLING
from .model import OpenedModel, tensors_of
from .model.surgery import Layer
from .progress import Progress, Silent

#: Rows an embedding never saw still weigh this share of the mean row.
_UNSEEN = 0.01


@dataclass
class Moments:
    """Mean and centred second moment of rows, merged exactly: M₂ ← M₂ᵃ + M₂ᵇ + δδᵀ·NₐN_b/(Nₐ+N_b)."""

    count: int = 0
    mean: Tensor | None = None
    second: Tensor | None = None

    def add(self, rows: Tensor) -> None:
        """Merge rows (N, n): products in the dtype of the rows, sums in float64."""
        if len(rows) == 0:
            return
        mean = rows.double().mean(0)
        centred = rows - mean.to(rows.dtype)
        # The rounding of the mean to the rows' dtype is taken out again.
        slip = centred.double().mean(0)
        second = (centred.T @ centred).double() - len(rows) * torch.outer(slip, slip)
        if self.mean is None or self.second is None:
            self.count, self.mean, self.second = len(rows), mean, second
            return
        total, delta = self.count + len(rows), mean - self.mean
        self.second += second + torch.outer(delta, delta) * (self.count * len(rows) / total)
        self.mean = self.mean + delta * (len(rows) / total)
        self.count = total


@dataclass
class _Collected:
    moments: Moments = field(default_factory=Moments)
    output: Tensor | None = None
    output_count: int = 0
    counts: Tensor | None = None


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
    """Return the statistics of `layers`; `gradient_samples` of the data also serve the output side (0: none).

    Raises `DataError` for data that gives no position, or activations that are not finite.
    """
    progress = progress or Silent()
    if len(data) == 0:
        raise DataError("calibration data", "at least one sample", "none")
    collected = {layer.name: _Collected() for layer in layers}
    generator = torch.Generator().manual_seed(seed)
    samples = used = 0
    device = torch.device(compute)
    module = module.to(device).eval()
    with progress.task("calibrate", total=len(data)) as advance:
        for batch in data.batches(batch_size):
            inputs = tensors_of(batch.inputs, device)
            size = len(next(iter(inputs.values())))
            with_gradient = used < gradient_samples
            _one_batch(opened, module, inputs, layers, collected, generator if with_gradient else None)
            samples, used = samples + size, used + size * with_gradient
            advance(size)
    module.cpu()
    return {layer.name: _finish(layer, collected[layer.name], samples, used) for layer in layers}


def _finish(layer: Layer, found: _Collected, samples: int, gradient_samples: int) -> Statistics:
    output = None
    if found.output is not None and found.output_count:
        output = (found.output / found.output_count).cpu()
    if layer.kind == "embedding":
        if found.counts is None:
            return Statistics()
        counts = found.counts.double().cpu()
        smoothed = counts + _UNSEEN * counts.mean()
        return Statistics(
            row_weights=smoothed / smoothed.sum(),
            output_gram=output,
            count=int(counts.sum()),
            positions=float(counts.sum()) / samples,
        )
    m = found.moments
    if m.mean is None or m.second is None:
        return Statistics()  # the layer was never reached
    if not torch.isfinite(m.second).all() or (output is not None and not torch.isfinite(output).all()):
        raise DataError(
            f"calibration data at layer {layer.name}",
            "finite activations",
            "NaN or infinity",
            "check the inputs and their scale",
        )
    gram = (m.second / m.count).cpu()
    return Statistics(
        gram=(gram + gram.T) / 2, mean=m.mean.cpu(), output_gram=output, count=m.count, positions=m.count / samples
    )


def _one_batch(
    opened: OpenedModel,
    module: nn.Module,
    inputs: Mapping[str, Tensor],
    layers: Sequence[Layer],
    collected: Mapping[str, _Collected],
    generator: torch.Generator | None,
) -> None:
    mask = _mask(inputs)
    outputs: dict[str, Tensor] = {}
    with _watching(module, layers, collected, mask, outputs if generator is not None else None), _frozen(module):
        with torch.set_grad_enabled(generator is not None):
            answer = telling_output(opened.outputs(module, inputs))
        if generator is None or not answer.requires_grad:
            return
        y = answer - answer.mean(-1, keepdim=True) if answer.shape[-1] > 1 else answer
        probe = torch.randn(y.shape, generator=generator).to(y)
        names = list(outputs)
        gradients = torch.autograd.grad((y * probe).sum(), [outputs[n] for n in names], allow_unused=True)
    kinds = {layer.name: layer.kind for layer in layers}
    for name, gradient in zip(names, gradients, strict=True):
        if gradient is not None:
            rows = _rows(gradient, kinds[name], mask)
            found = collected[name]
            gram = (rows.T @ rows).double()
            found.output = gram if found.output is None else found.output + gram
            found.output_count += len(rows)


@contextlib.contextmanager
def _frozen(module: nn.Module) -> Iterator[None]:
    """Gradients flow through activations only: no weight gradient is computed."""
    trainable = [p for p in module.parameters() if p.requires_grad]
    for p in trainable:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in trainable:
            p.requires_grad_(True)


@contextlib.contextmanager
def _watching(
    module: nn.Module,
    layers: Sequence[Layer],
    collected: Mapping[str, _Collected],
    mask: Tensor | None,
    outputs: dict[str, Tensor] | None,
) -> Iterator[None]:
    """Hook every layer: take its input's moments and, if `outputs` is given, keep its output in the graph."""
    seen: dict[tuple[Any, ...], tuple[Tensor, Moments]] = {}
    handles = []

    def hook(layer: Layer) -> Any:
        def run(target: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> Tensor | None:
            x = args[0].detach()
            if layer.kind == "embedding":
                _count(collected[layer.name], x, layer.shape[0], mask)
            else:
                _add_rows(collected[layer.name], seen, target, layer, x, mask)
            if outputs is None:
                return None
            kept = out if out.requires_grad else out.detach().requires_grad_(True)
            outputs[layer.name] = kept
            return kept.clone()  # what follows may work in place

        return run

    for layer in layers:
        handles.append(module.get_submodule(layer.name).register_forward_hook(hook(layer)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _add_rows(
    found: _Collected,
    seen: dict[tuple[Any, ...], tuple[Tensor, Moments]],
    target: nn.Module,
    layer: Layer,
    x: Tensor,
    mask: Tensor | None,
) -> None:
    """Add the rows of `x`, once per distinct input: layers that read the same tensor share the `Moments` object."""
    walk = (
        (target.kernel_size, target.stride, target.padding, target.dilation, target.padding_mode)
        if layer.kind == "conv"
        else ()
    )
    key = (x.data_ptr(), x._version, tuple(x.shape), x.stride(), walk)
    if key in seen:
        found.moments = seen[key][1]
        return
    seen[key] = (x, found.moments)  # holding x keeps its address from being used again within this pass
    found.moments.add(patches(x, target) if layer.kind == "conv" else _rows(x, "linear", mask))


def _rows(x: Tensor, kind: str, mask: Tensor | None) -> Tensor:
    """Return activations as rows: (…, n) of a linear layer without padding, (batch, n, *space) of a convolution."""
    if kind == "conv":
        return x.movedim(1, -1).reshape(-1, x.shape[1])
    if mask is not None and x.dim() == mask.dim() + 1 and x.shape[:-1] == mask.shape:
        return x[mask]
    return x.reshape(-1, x.shape[-1])


def _mask(inputs: Mapping[str, Tensor]) -> Tensor | None:
    mask = inputs.get("attention_mask")
    return mask.bool() if mask is not None and mask.dim() == 2 else None


def _count(found: _Collected, ids: Tensor, rows: int, mask: Tensor | None) -> None:
    if mask is not None and ids.shape == mask.shape:
        ids = ids[mask]
    counts = torch.bincount(ids.reshape(-1), minlength=rows)
    found.counts = counts if found.counts is None else found.counts + counts


def patches(x: Tensor, layer: nn.Module) -> Tensor:
    """Return the patches (positions, in·kernel) that a convolution reads, ordered (channel, *kernel), padding included."""
    kernel, dilation, stride = layer.kernel_size, layer.dilation, layer.stride
    padding: Any = layer.padding
    if padding == "same":
        before = [((d * (k - 1)) // 2, d * (k - 1) - (d * (k - 1)) // 2) for d, k in zip(dilation, kernel, strict=True)]  # type: ignore[arg-type]
    elif padding == "valid":
        before = [(0, 0)] * len(kernel)  # type: ignore[arg-type]
    else:
        before = [(p, p) for p in padding]
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    if any(a or b for a, b in before):
        x = F.pad(x, [n for pair in reversed(before) for n in pair], mode=mode)  # type: ignore[arg-type]
    for axis, (k, d, s) in enumerate(zip(kernel, dilation, stride, strict=True)):  # type: ignore[arg-type]
        x = _windows(x, 2 + axis, k, d, s)
    axes = len(kernel)  # type: ignore[arg-type]
    x = x.movedim(1, 1 + axes)  # (batch, *positions, channel, *kernel)
    return x.reshape(-1, x.shape[1 + axes] * int(torch.tensor(kernel).prod()))


def _windows(x: Tensor, axis: int, size: int, dilation: int, stride: int) -> Tensor:
    """Slide a dilated window along `axis`; its positions are appended as the last axis."""
    span = dilation * (size - 1) + 1
    return x.unfold(axis, span, stride)[..., ::dilation]
