"""Put a plan into a network in the order of its depth, so that each layer makes up for what those before it changed.

At every layer the network as it is and the copy stand side by side (`model.lockstep`). The layer is fitted to what it
should answer on what now reaches it, blended with its own answer by the share β that loses least on held-out inputs,
and the bias carries both means. A layer that the plan keeps dense is refitted alike: that costs no numbers.

Source: the normal equations of `factorize._anchor`; arXiv 2604.02119 for anchoring in depth order.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ..calibrate import MAX_OUTPUTS
from ..data import Data
from ..factorize import Drift, Factorization, Refused, Statistics, anchored, form
from ..model import OpenedModel
from ..model.lockstep import Flow, Pair, Stop, at_stop, flow_of, lockstep
from ..model.surgery import Layer, replace_layer, set_submodule
from ..model.views import Walk
from ..model.views.walk import walks_of
from ..plan import Choice
from ..progress import Progress, Silent
from ..threads import Threads, apart
from ._moments import Answers, JointMoments, answers_of
from .judge import read_batches

#: Blends that are tried.
BETAS = (0.0, 0.5, 1.0)
#: One batch in so many is held out for choosing the blend.
_HELD_OUT = 8
_BATCHES, _MOST_SAMPLES = 8, 128
#: So many positions per input are plenty to fit to.
_PLENTY = 512
#: At least this share of all samples is fitted to.
_LEAST = 0.25
#: How often the answers wanted are adapted to what a rectifier behind the layer forgives.
ROUNDS = 1


@dataclass(frozen=True)
class Fitted:
    """What became of one layer: its factors (None where it stays dense), the blend, and its error on held-out answers."""

    factors: Factorization | None
    beta: float
    rel_error: float


def fitting_layers(
    opened: OpenedModel, module: nn.Module, inputs: Mapping[str, Tensor], layers: Sequence[Layer]
) -> tuple[Flow, list[str]]:
    """Return how values flow, and the layers that can be fitted one after the other: called once, without a tie."""
    able = [
        layer.name for layer in layers
        if layer.reason is None and layer.kind in ("linear", "conv", "grouped") and layer.outputs <= MAX_OUTPUTS
    ]  # fmt: skip
    flow = flow_of(opened, module, inputs, able)
    return flow, [n for n in flow.once if n in set(able)]


def apply_in_depth(
    opened: OpenedModel,
    original: nn.Module,
    copy: nn.Module,
    layers: Sequence[Layer],
    choices: Mapping[str, Choice],
    statistics: Mapping[str, Statistics],
    data: Data,
    *,
    betas: Sequence[float] = BETAS,
    progress: Progress | None = None,
) -> dict[str, Fitted]:
    """Change `copy`, which is `original` but for layers changed already, into what `choices` say; return what was made.

    `layers` are those to fit, each called once and read by no other part. `original` is left as it is.
    """
    progress = progress or Silent()
    size = max(1, min(_MOST_SAMPLES, -(-len(data) // _BATCHES)))
    batches = read_batches(data, size)
    flow, order = fitting_layers(opened, original, _first_samples(batches[0]), layers)
    by_name = {layer.name: layer for layer in layers}
    walks = walks_of(original, order)
    masks = [_mask(b) for b in batches]
    fitted = {}
    with progress.task("fit in depth order", total=len(order)) as advance, apart() as threads:
        for stop in lockstep(opened, original, copy, batches, flow, order, threads):
            layer = by_name[stop.layer]
            seen = _seen(stop, masks, walks.get(stop.layer), stop.layer in flow.rectified, layer, threads)
            g = statistics.get(stop.layer, Statistics()).output_gram
            fitted[stop.layer] = _fit(copy, layer, choices[stop.layer], seen, g, betas)
            advance(1, stop.layer)
    return fitted


def _first_samples(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {k: v[:2] for k, v in batch.items()}


def _mask(batch: Mapping[str, Tensor]) -> Tensor | None:
    mask = batch.get("attention_mask")
    return mask.bool() if mask is not None and mask.dim() == 2 else None


def _seen(
    stop: Stop, masks: Sequence[Tensor | None], walk: Walk | None, rectified: bool, layer: Layer, threads: Threads
) -> _Seen:
    """Return what a layer sees: some samples of each batch where all have so many positions that more tell nothing new."""
    answers = stop.answers
    positions = sum(a.numel() // a.shape[-1 if walk is None else 1] for a in answers)
    pairs = stop.pairs(max(_PLENTY * layer.columns / positions, _LEAST))
    cut = [None if m is None else m[: len(p.clean)] for m, p in zip(masks, pairs, strict=True)]
    return _Seen(pairs, cut, walk, rectified, threads)


@dataclass(frozen=True)
class _Seen:
    """What a layer reads and should answer, batch by batch; some are held out where there are enough."""

    pairs: Sequence[Pair]
    masks: Sequence[Tensor | None]
    walk: Walk | None
    rectified: bool
    threads: Threads

    @property
    def held_out(self) -> list[int]:
        """The batches that are held out."""
        return list(range(len(self.pairs) - 1, 0, -_HELD_OUT))

    def moments(self) -> tuple[JointMoments, JointMoments]:
        """Return the joint moments of the batches to fit, and of those held out."""
        fitting, held, aside = JointMoments(), JointMoments(), set(self.held_out)
        for k, moments in enumerate(self.threads.stream(self._of, range(len(self.pairs)))):
            (held if k in aside else fitting).merge(moments)
        return fitting, held

    def _of(self, k: int) -> JointMoments:
        return JointMoments.of(self.pairs[k].wanted(), self.pairs[k].drifted, self.walk, self.masks[k])

    def answering(self, before: JointMoments, said: Callable[[Tensor], Tensor]) -> JointMoments:
        """Return the moments of all batches, `before` with those held out merged, for a layer that answers `said`."""
        order = [*(k for k in range(len(self.pairs)) if k not in self.held_out), *self.held_out]

        def answers(k: int) -> Answers:
            pair = self.pairs[k]
            with torch.no_grad():
                return answers_of(pair.wanted(said(pair.drifted)), pair.drifted, self.walk, self.masks[k])

        return before.answering(self.threads.stream(answers, order))


def _fit(
    copy: nn.Module, layer: Layer, choice: Choice, seen: _Seen, output_gram: Tensor | None, betas: Sequence[float]
) -> Fitted:
    """Fit one layer and put it in its place."""
    path = at_stop(layer.name)
    plain = copy.get_submodule(path)
    own_bias = getattr(plain, "bias", None)
    bias = torch.zeros(layer.plain_shape[0]) if own_bias is None else own_bias.detach().clone()
    make = _maker(layer, choice, output_gram)
    fitting, held = seen.moments()
    beta, error = max(betas), None
    if held.read.count:
        drift, g = _without_bias(held.drift(), bias), Statistics(output_gram=output_gram).g
        tried = _trial(layer, choice, _drift(fitting, layer, bias), output_gram)

        def loss(beta: float) -> float:
            rebuilt, shift = tried(beta)
            return drift.loss(rebuilt, g, shift)

        losses = dict(zip(betas, seen.threads.each(loss, betas), strict=True))
        beta = min(losses, key=lambda b: (losses[b], -b))
        total = drift.total(g)
        error = (losses[beta] / total) ** 0.5 if total > 0 else 0.0
    fitting.merge(held)
    for round_ in range(1 + (ROUNDS if seen.rectified and choice.form != "dense" else 0)):
        if round_:
            fitting = seen.answering(fitting, copy.get_submodule(path))
        with seen.threads.together(layer.columns):
            factors, rebuilt, shift = make(_drift(fitting, layer, bias), beta)
        if factors is None:
            _refill(plain, rebuilt, shift)
        else:
            set_submodule(copy, path, plain)  # the layer that tells how its factors walk
            new = replace_layer(copy, path, replace(factors, bias_shift=None))
            if shift.abs().max() > 0 or own_bias is not None:
                new.bias = nn.Parameter((bias.double() + shift).to(layer.weight.dtype))
    return Fitted(factors, beta, error if error is not None else (0.0 if factors is None else factors.rel_error))


#: blend -> the weight that a choice would stand for, what it adds to the bias
_Trial = Callable[[float], tuple[Tensor, Tensor]]


def _trial(layer: Layer, choice: Choice, drift: Drift, output_gram: Tensor | None) -> _Trial:
    """Return what tells for a blend the weight that the choice would stand for, and what it adds to the bias.

    In the plain gauge of a form, which is the same product for less work.
    """
    groups = drift.drifted.shape[0] if drift.drifted.dim() == 3 else 1
    metric = Statistics(gram=drift.drifted, output_gram=output_gram, groups=groups)
    plain = form(getattr(form(choice.form), "PLAIN", choice.form))
    weight = layer.weight.double()
    step, own = drift.target(layer.weight) - weight, drift.shift(weight)

    def tried(beta: float) -> tuple[Tensor, Tensor]:
        rebuilt = weight + beta * step
        if choice.form != "dense":
            rebuilt = plain.decompose(rebuilt, choice.rank, metric).to_tensor()
        return rebuilt, drift.shift(rebuilt) - (1 - beta) * own

    return tried


#: (drift, β) -> factors (None: dense), the weight they stand for, what to add to the bias.
_Make = Callable[[Drift, float], tuple[Factorization | None, Tensor, Tensor]]


def _maker(layer: Layer, choice: Choice, output_gram: Tensor | None) -> _Make:
    def make(drift: Drift, beta: float) -> tuple[Factorization | None, Tensor, Tensor]:
        if choice.form == "dense":
            rebuilt = drift.target(layer.weight, beta)
            return None, rebuilt, drift.blended(layer.weight, beta).shift(rebuilt)
        try:
            found = anchored(choice.form, layer.weight, choice.rank, drift, beta=beta, output_gram=output_gram)
        except Refused:
            name, rank = plainer(choice, layer)
            found = anchored(name, layer.weight, rank, drift, beta=beta, output_gram=output_gram)
        assert found.bias_shift is not None
        return found, found.to_tensor(), found.bias_shift

    return make


def plainer(choice: Choice, layer: Layer) -> tuple[str, int]:
    """Return the form in its plain gauge, at the largest rank that stores no more numbers: what a refused form becomes."""
    plain = form(form(choice.form).PLAIN)
    assert isinstance(choice.rank, int)
    most = form(choice.form).n_params(layer.shape, choice.rank)
    fitting = [r for r in range(1, choice.rank + 1) if plain.n_params(layer.shape, r) <= most]
    return form(choice.form).PLAIN, max(fitting, default=1)


def _drift(moments: JointMoments, layer: Layer, bias: Tensor) -> Drift:
    """Return the drift that a layer is fitted to: where the positions are few, with what they cannot say left alone."""
    return _without_bias(moments.drift(), bias).shrunk(layer.weight, moments.read.count)


def _without_bias(drift: Drift, bias: Tensor) -> Drift:
    """Return the drift of answers without the layer's own bias, which stays where it is."""
    return replace(drift, answer_mean=drift.answer_mean - bias.double().reshape(drift.answer_mean.shape))


def _refill(module: nn.Module, weight: Tensor, shift: Tensor) -> None:
    """Give a dense layer its refitted weight, as it stores it, and bias; without a bias the weight stays too."""
    bias, stored = getattr(module, "bias", None), module.weight
    if bias is None:
        return
    assert isinstance(stored, nn.Parameter)
    with torch.no_grad():
        matrix = weight.reshape(stored.shape) if weight.numel() and _as_stored(module, weight) else weight.T
        module.weight = nn.Parameter(matrix.to(stored.dtype).contiguous())
        module.bias = nn.Parameter((bias.double() + shift).to(bias.dtype))


def _as_stored(module: nn.Module, weight: Tensor) -> bool:
    """Transformers' Conv1D stores (in, out)."""
    return type(module).__name__ != "Conv1D" or hasattr(module, "kernel_size")
