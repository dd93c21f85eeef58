"""Steps of factors in coordinates where what they multiply is white.

A factor F (out, n) multiplies inputs z (patches, for a convolution) with moment C = E[zzᵀ]. A step Δ changes what it
answers by Δz, of mean square tr(ΔCΔᵀ): along a direction in which inputs are large the loss is steep, along one in which
they are small it is flat, and an optimizer that steps entry by entry serves neither. With S = C^½ and F' = FS the same
change is ‖Δ'‖²: the optimizer is shown the gradient gS⁻¹, and its step Δ' comes back as Δ'S⁻¹. Nothing else changes:
F is what is kept, and no copy of it in other coordinates can drift.

ResNet-20 at a quarter of its numbers, 300 steps, seed 0: KL to the original on test images 0.304 instead of 0.354, from
0.437 (n = 5,000).

Source: Martens & Grosse, arXiv 1503.05671 (the input side of K-FAC).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..calibrate.moments import gram
from ..model.views import Walk, patches

#: What is added to every direction's moment, in units of their mean.
_DAMPING = 1e-3
#: Wider inputs are left as they are: a root costs their cube.
_WIDEST = 2048
#: Samples that are looked at together, for the memory of their patches.
_TOGETHER = 16
_CONVS: dict[Callable[..., Any], int] = {torch.conv1d: 1, torch.conv2d: 2, torch.conv3d: 3}


@dataclass(frozen=True)
class Root:
    """S = (C + damping)^½ of a factor's inputs, scaled to mean square 1, and its inverse: (n, n) each."""

    root: Tensor
    inverse: Tensor

    @classmethod
    def of(cls, moment: Tensor) -> Root | None:
        """Return the root of a moment (n, n); None where no input was anything but zero."""
        mean = float(moment.diagonal().mean())
        if not (math.isfinite(mean) and mean > 0):
            return None
        values, vectors = torch.linalg.eigh((moment + moment.T) / (2 * mean))
        roots = (values.clamp_min(0) + _DAMPING).sqrt()
        return cls(((vectors * roots) @ vectors.T).float(), ((vectors / roots) @ vectors.T).float())


def roots_of(
    parameters: Mapping[str, nn.Parameter], batches: Sequence[Any], ask: Callable[[Any], Any]
) -> dict[str, Root]:
    """Return roots by name for the parameters that, while `ask` answers the batches, are weights of a product.

    Such is a linear map or a convolution without groups whose weight is the parameter, reshaped or not.
    """
    listener = _Listener(parameters)
    with torch.no_grad(), listener:
        for batch in batches:
            ask(batch)
    found = {name: Root.of(moment) for name, moment in listener.moments.items()}
    return {name: root for name in parameters if (root := found.get(name)) is not None}


class _Listener(TorchFunctionMode):
    """Sums the moments of what is multiplied by each of the parameters."""

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        super().__init__()
        self._names = {(p.data_ptr(), p.numel()): n for n, p in parameters.items() if p.dim() > 1 and p.is_contiguous()}
        self.moments: dict[str, Tensor] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.nn.functional.linear or func in _CONVS:
            self._listen(func, *args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))

    def _listen(
        self, func: Any, x: Tensor, weight: Tensor, bias: Any = None, stride: Any = 1, padding: Any = 0,
        dilation: Any = 1, groups: int = 1,
    ) -> None:  # fmt: skip
        name = self._names.get((weight.data_ptr(), weight.numel()))
        if name is None or groups != 1 or weight[0].numel() > _WIDEST or not weight.is_contiguous():
            return
        if func not in _CONVS:
            rows = [x.reshape(-1, x.shape[-1])]
        else:
            walk = _walk(_CONVS[func], weight, stride, padding, dilation)
            batched = x if x.dim() == weight.dim() else x[None]
            rows = [patches(part, walk) for part in torch.split(batched, _TOGETHER)]
        for part in rows:
            moment = gram(part.float())
            self.moments[name] = self.moments[name] + moment if name in self.moments else moment


def _walk(axes: int, weight: Tensor, stride: Any, padding: Any, dilation: Any) -> Walk:
    def each(value: Any) -> tuple[int, ...]:
        return tuple(value) if isinstance(value, tuple | list) else (value,) * axes

    kernel = tuple(weight.shape[2:])
    if isinstance(padding, str):
        around, auto = (0,) * axes, "upper" if padding == "same" else ""
    else:
        around, auto = each(padding), ""
    return Walk(kernel, each(stride), each(dilation), tuple((p, p) for p in around), auto)


class Whitened:
    """AdamW on named parameters; those with a root are stepped in their white coordinates.

    `scales`: what a rate of 1 means for each parameter, in units of its own, or of its white coordinates.
    """

    def __init__(
        self, parameters: Mapping[str, nn.Parameter], scales: Mapping[str, float], roots: Mapping[str, Root], *,
        weight_decay: float,
    ) -> None:  # fmt: skip
        self._parameters, self._roots, self._decay = parameters, roots, weight_decay
        # A white parameter is stepped from zero every time: what the optimizer holds is the step alone.
        self.seen: dict[str, Tensor] = {
            n: torch.zeros(len(p), p[0].numel(), device=p.device) if n in roots else p for n, p in parameters.items()
        }
        self._scales = {n: _rounded(scales[n]) for n in parameters}
        groups: dict[tuple[float, bool], list[Tensor]] = {}
        for name, tensor in self.seen.items():
            groups.setdefault((self._scales[name], name in roots), []).append(tensor)
        self._adam = torch.optim.AdamW(
            [
                {"params": members, "scale": scale, "weight_decay": 0.0 if white else weight_decay}
                for (scale, white), members in groups.items()
            ], lr=1.0, fused=True,
        )  # fmt: skip

    def step(self, rate: float, longest: float) -> None:
        """Take one step at a rate; a gradient longer than `longest` is cut to it."""
        for name, root in self._roots.items():
            g = self._parameters[name].grad
            self.seen[name].grad = None if g is None else g.flatten(1) @ root.inverse
        torch.nn.utils.clip_grad_norm_(list(self.seen.values()), longest)
        for group in self._adam.param_groups:
            group["lr"] = rate * group["scale"]
        self._adam.step()
        with torch.no_grad():
            for name, root in self._roots.items():
                p, step = self._parameters[name], self.seen[name]
                if self._decay:
                    p.mul_(1 - rate * self._scales[name] * self._decay)
                p.add_((step @ root.inverse).view_as(p))
                step.zero_()

    @property
    def known(self) -> bool:
        """Whether it has seen a gradient."""
        return bool(self._adam.state)

    def state_of(self, name: str) -> dict[str, Any]:
        """Return what the optimizer knows of a parameter; empty before the first step."""
        return dict(self._adam.state.get(self.seen[name], {}))

    def put_state(self, name: str, state: Mapping[str, Any]) -> None:
        self._adam.state[self.seen[name]] = dict(state)


def white_scales(
    parameters: Mapping[str, nn.Parameter], scales: Mapping[str, float], roots: Mapping[str, Root], floor: float
) -> dict[str, float]:
    """Return `scales` with the root mean square of the white coordinates where a parameter has them."""
    white = {
        n: float((p.detach().flatten(1) @ roots[n].root).square().mean().sqrt())
        for n, p in parameters.items()
        if n in roots
    }
    return {n: max(white[n], floor) if n in white else scales[n] for n in parameters}


def _rounded(scale: float) -> float:
    """Return a scale rounded to a power of √2: few groups are stepped faster than many."""
    return float(2 ** (round(2 * math.log2(scale)) / 2))
