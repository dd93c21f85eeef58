"""Run a network and its changing copy side by side, layer by layer, in one pass over the data.

Every batch has two forward passes, one through the network as it is and one through the copy, and each of them stands
still where it reaches a layer. When all have reached it, whoever asked sees what the layer reads in both, decides what
takes its place in the copy, and all go on: however many layers there are, the data go through each network once, and
no intermediate value outlives its use.

    flow = flow_of(opened, original, a_few_samples, names)
    for stop in lockstep(opened, original, copy, batches, flow, flow.once):
        ...                                          # stop.pairs(): clean and drifted input, what is added behind
        replace_layer(copy, at_stop(stop.layer), factors)    # the copy's passes go on with what stands there now

Where the answer of a layer is added to another value that exists already (the shortcut of a residual block), the
stop also tells by how much that value has drifted, so that the layer can make up for it.
"""

from __future__ import annotations

import contextlib
import functools
import math
import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ModelError
from ..threads import ONE, Threads
from .flow import Abandoned, Counting, Flow, Position, first_of, flow_of
from .opened import OpenedModel
from .surgery import set_submodule


@dataclass(frozen=True)
class Pair:
    """What a layer reads in one batch: of the network as it is, and of the copy.

    `answer`: what the layer says to `clean`. `beside`: the value that its answer will be added to, in the network and
    in the copy, shaped like the answer; None where it is added to nothing.
    """

    clean: Tensor
    drifted: Tensor
    answer: Tensor
    beside: tuple[Tensor, Tensor] | None

    def wanted(self, said: Tensor | None = None) -> Tensor:
        """Return what the copy's layer should answer, so that the sum, too, is the network's.

        `said`: what it answers now, where all that is negative of the sum is cut off afterwards: where the network's
        sum is, any answer will do that keeps the copy's negative.
        """
        if self.beside is None:
            total, most = self.answer, torch.zeros((), dtype=self.answer.dtype, device=self.answer.device)
            found = self.answer
        else:
            total, most = self.answer + self.beside[0], -self.beside[1]
            found = total + most
        return found if said is None else torch.where(total <= 0, torch.minimum(said, most), found)


@dataclass(frozen=True)
class Stop:
    """All passes stand before `layer`."""

    layer: str
    _at: Sequence[tuple[_Arrival, _Arrival]]
    _ahead: Callable[[int, int], tuple[Tensor, Tensor] | None]
    _threads: Threads

    @property
    def answers(self) -> list[Tensor]:
        """What the layer of the network answers, batch by batch."""
        return [clean.answer for clean, _ in self._at if clean.answer is not None]

    def pairs(self, share: float = 1.0) -> list[Pair]:
        """Return what the layer reads, batch by batch: of the first samples of each, so large a share of them."""
        return self._threads.each(functools.partial(self._pair, share), range(len(self._at)))

    def _pair(self, share: float, k: int) -> Pair:
        clean, drifted = self._at[k]
        assert clean.answer is not None
        n = math.ceil(min(share, 1) * len(clean.answer))
        answer, others = clean.answer[:n], self._ahead(k, n)
        if others is None and clean.other is not None and drifted.other is not None:
            others = clean.other[:n], drifted.other[:n]
        # Where the data decide what is computed, another value may stand at that position.
        fits = others is not None and all(o.shape == answer.shape for o in others)
        return Pair(clean.value[:n], drifted.value[:n], answer, others if fits else None)


@dataclass
class _Arrival:
    layer: str
    value: Tensor
    answer: Tensor | None
    other: Tensor | None


class _Strand:
    """One forward pass in a thread of its own, which runs only while someone waits for it."""

    def __init__(self, forward: Callable[[_Strand], None]) -> None:
        self._go, self._still = threading.Semaphore(0), threading.Semaphore(0)
        self._abandoned = False
        self.arrival: _Arrival | None = None
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, args=(forward,), daemon=True)
        self._thread.start()

    def _run(self, forward: Callable[[_Strand], None]) -> None:
        self._go.acquire()
        try:
            if not self._abandoned:
                with torch.no_grad():
                    forward(self)
        except Abandoned:
            pass
        except BaseException as e:  # raised again where the pass was asked for
            self._failure = e
        self.arrival = None
        self._still.release()

    def stand(self, arrival: _Arrival) -> None:
        """Wait, inside the pass, until it is asked to go on."""
        self.arrival = arrival
        self._still.release()
        self._go.acquire()
        if self._abandoned:
            raise Abandoned

    def advance(self) -> _Arrival | None:
        """Let the pass run to its next layer; None when it has ended."""
        self._go.release()
        self._still.acquire()
        if self._failure is not None:
            raise self._failure
        return self.arrival

    def abandon(self) -> None:
        if self._thread.is_alive():
            self._abandoned = True
            self._go.release()
            self._thread.join()


@dataclass
class _Pass:
    """What one thread knows of its pass, which stands still at layers where there is a `strand`."""

    strand: _Strand | None
    counting: Counting
    flow: Flow

    def other(self, layer: str) -> Tensor | None:
        """Return, once, the value that the answer of `layer` will be added to."""
        at = self.flow.additions.get(layer)
        return None if at is None else self.counting.values.get(at)


class _Gate(nn.Module):
    """Stands in the copy where a layer was, and hands over to what `layer` is once the pass goes on.

    Whatever else of the layer is read (its weight's dtype, say) is read from that layer.
    """

    def __init__(self, name: str, layer: nn.Module, here: threading.local) -> None:
        super().__init__()
        self.layer = layer
        self._name, self._here = name, here

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("layer"), name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        here: _Pass | None = getattr(self._here, "now", None)
        if here is None:
            return self.layer(*args, **kwargs)
        here.counting.inside = True
        if here.strand is not None:
            here.strand.stand(_Arrival(self._name, first_of(args, kwargs), None, here.other(self._name)))
        out = self.layer(*args, **kwargs)
        here.counting.answered(out)
        return out


def lockstep(
    opened: OpenedModel,
    original: nn.Module,
    copy: nn.Module,
    batches: Sequence[Mapping[str, Tensor]],
    flow: Flow,
    names: Collection[str],
    threads: Threads = ONE,
) -> Iterator[Stop]:
    """Yield a stop at each of the layers `names`, which must be called once, in the order of the calls.

    Between two stops the copy's layer, at the path `at_stop(name)`, may be exchanged. `threads`: so many batches run
    at a time. Raises `ModelError` where two passes do not call the same layers in the same order. The copy has its
    layers back when this ends.
    """
    here = threading.local()
    wanted = {flow.additions[n] for n in names if n in flow.additions}
    order = [n for n in flow.calls if n in set(names)]
    others = sorted(flow.counted - set(order))
    with _gated(copy, order, here), _hooked(original, order, others, here), _hooked(copy, (), others, here):
        strands = [
            (_strand(opened, original, b, here, flow, wanted), _strand(opened, copy, b, here, flow, wanted))
            for b in batches
        ]

        def ahead(name: str, k: int, samples: int) -> tuple[Tensor, Tensor] | None:
            at = flow.ahead.get(name)
            if at is None:
                return None
            inputs = {n: t[:samples] for n, t in batches[k].items()}
            clean, drifted = (_run_to(opened, m, inputs, here, flow, at) for m in (original, copy))
            return None if clean is None or drifted is None else (clean, drifted)

        try:
            for name in order:
                at = threads.each(functools.partial(_both, name=name), strands)
                yield Stop(name, at, functools.partial(ahead, name), threads)
            for strand in (s for pair in strands for s in pair):
                _check_next(strand.advance(), None)
        finally:
            for strand in (s for pair in strands for s in pair):
                strand.abandon()


def _run_to(
    opened: OpenedModel,
    module: nn.Module,
    inputs: Mapping[str, Tensor],
    here: threading.local,
    flow: Flow,
    position: Position,
) -> Tensor | None:
    """Return the value at `position` of a pass that does not stand still: what lies ahead of the others."""
    counting = Counting({position}, last=position)
    here.now = _Pass(None, counting, flow)
    try:
        with contextlib.suppress(Abandoned), torch.no_grad(), counting:
            opened.outputs(module, inputs)
    finally:
        here.now = None
    return counting.values.get(position)


def at_stop(name: str) -> str:
    """Return the path of a layer in the copy while the passes stand still."""
    return f"{name}.layer"


def _expect(strand: _Strand, name: str) -> _Arrival:
    arrival = strand.advance()
    _check_next(arrival, name)
    assert arrival is not None
    return arrival


def _both(strands: tuple[_Strand, _Strand], name: str) -> tuple[_Arrival, _Arrival]:
    return _expect(strands[0], name), _expect(strands[1], name)


def _check_next(arrival: _Arrival | None, name: str | None) -> None:
    """Raise `ModelError` where a pass is not at the layer `name`, None: at its end."""
    if (None if arrival is None else arrival.layer) != name:
        expected = "the end" if name is None else f"the layer {name} next"
        got = "the end" if arrival is None else arrival.layer
        raise ModelError("the model", f"{expected} in every batch", got, "its layers depend on the data")


def _strand(
    opened: OpenedModel, module: nn.Module, inputs: Mapping[str, Tensor], here: threading.local, flow: Flow,
    wanted: Collection[Position],
) -> _Strand:  # fmt: skip
    def forward(strand: _Strand) -> None:
        counting = Counting(wanted)
        here.now = _Pass(strand, counting, flow)
        with counting:
            opened.outputs(module, inputs)

    return _Strand(forward)


@contextlib.contextmanager
def _gated(copy: nn.Module, names: Sequence[str], here: threading.local) -> Iterator[None]:
    for name in names:
        set_submodule(copy, name, _Gate(name, copy.get_submodule(name), here))
    try:
        yield
    finally:
        for name in names:
            set_submodule(copy, name, copy.get_submodule(at_stop(name)))


@contextlib.contextmanager
def _hooked(module: nn.Module, stops: Sequence[str], others: Sequence[str], here: threading.local) -> Iterator[None]:
    """Count calls of the named parts as one operation, and make passes stand still at `stops`.

    They do so behind the layer, so that its answer is there too.
    """

    def enter(_: nn.Module, args: Any) -> None:
        now: _Pass | None = getattr(here, "now", None)
        if now is not None:
            now.counting.inside = True

    def leave(name: str, *, stops: bool) -> Any:
        def run(_: nn.Module, args: Any, kwargs: Any, out: Tensor) -> None:
            now: _Pass | None = getattr(here, "now", None)
            if now is not None:
                if stops and now.strand is not None:
                    now.strand.stand(_Arrival(name, first_of(args, kwargs), out, now.other(name)))
                now.counting.answered(out)

        return run

    handles: list[Any] = []
    for name in (*stops, *others):
        layer = module.get_submodule(name)
        handles.append(layer.register_forward_pre_hook(enter))
        handles.append(layer.register_forward_hook(leave(name, stops=name in stops), with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


__all__ = ["Flow", "Pair", "Stop", "at_stop", "flow_of", "lockstep"]
