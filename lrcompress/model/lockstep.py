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
import threading
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ..errors import ModelError
from .opened import OpenedModel
from .surgery import set_submodule

_ADDITIONS = (torch.ops.aten.add.Tensor, torch.ops.aten.add_.Tensor)


@dataclass(frozen=True)
class Pair:
    """What a layer reads in one batch: of the network as it is, and of the copy.

    `answer`: what the layer says to `clean`. `behind`: by how much the value that it will be added to is larger in
    the network than in the copy, shaped like the answer; None where it is added to nothing.
    """

    clean: Tensor
    drifted: Tensor
    answer: Tensor
    behind: Tensor | None


@dataclass(frozen=True)
class Stop:
    """All passes stand before `layer`."""

    layer: str
    _at: Sequence[tuple[_Arrival, _Arrival]]
    _ahead: Callable[[int], tuple[Tensor, Tensor] | None]

    def pairs(self) -> Iterator[Pair]:
        """Yield what the layer reads, batch by batch."""
        for k, (clean, drifted) in enumerate(self._at):
            others = self._ahead(k)
            if others is None and clean.other is not None and drifted.other is not None:
                others = clean.other, drifted.other
            assert clean.answer is not None
            yield Pair(clean.value, drifted.value, clean.answer, None if others is None else others[0] - others[1])


@dataclass(frozen=True)
class Flow:
    """How values run between the layers of a network, as one small batch showed it.

    `calls`: the layers in the order they are called, with repetitions. `additions`: layer → position of the value
    that its answer is added to, where that exists before the layer is called; `ahead`: where it comes later.
    """

    calls: tuple[str, ...]
    additions: Mapping[str, int]
    ahead: Mapping[str, int]

    @property
    def once(self) -> tuple[str, ...]:
        """The layers that are called once, in order."""
        counts = Counter(self.calls)
        return tuple(n for n in self.calls if counts[n] == 1)


class _Abandoned(BaseException):
    """Ends a pass whose caller is gone; no code of a model's may catch it as an error of its own."""


@dataclass
class _Arrival:
    layer: str
    value: Tensor
    answer: Tensor | None
    other: Tensor | None


class Counting(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Give every value that is made outside of layers its position; keep those that are wanted, or all of them.

    Layers count too: their answer takes a position like any other operation, whatever happens inside. The pass ends
    behind position `last`.
    """

    def __init__(self, wanted: Collection[int] | None, *, last: int | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.position = 0
        self.inside = False
        self._last = last
        self.values: dict[int, Tensor] = {}
        self.uses: list[tuple[Any, tuple[Tensor, ...], dict[str, Any], int]] = []
        self._wanted = wanted

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if not self.inside:
            if self._wanted is None:
                flat = tuple(a for a in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(a, Tensor))
                self.uses.append((func, flat, kwargs, self.position))
            self.made(out)
        return out

    def made(self, out: Any) -> None:
        """Count one operation whose result is `out`."""
        if isinstance(out, Tensor) and (self._wanted is None or self.position in self._wanted):
            self.values[self.position] = out
        if self.position == self._last:
            raise _Abandoned
        self.position += 1


def flow_of(opened: OpenedModel, module: nn.Module, inputs: Mapping[str, Tensor], names: Collection[str]) -> Flow:
    """Run one small batch and return how the named layers are called and what their answers are added to."""
    counting = Counting(None)
    calls: list[str] = []
    answers: dict[str, int] = {}

    def before(layer: str) -> None:
        counting.inside = True
        calls.append(layer)

    def after(layer: str, out: Tensor) -> None:
        counting.inside = False
        answers[layer] = counting.position
        counting.made(out)

    with _watched(module, names, before, after), torch.no_grad(), counting:
        opened.outputs(module, inputs)
    numbers: dict[int, list[int]] = {}
    for position, value in sorted(counting.values.items()):
        numbers.setdefault(id(value), []).append(position)
    additions: dict[str, int] = {}
    ahead: dict[str, int] = {}
    for layer, position in answers.items():
        other = _added_to(counting, position, numbers) if calls.count(layer) == 1 else None
        if other is not None:
            (additions if other < position else ahead)[layer] = other
    return Flow(tuple(calls), additions, ahead)


def _added_to(counting: Counting, position: int, numbers: Mapping[int, list[int]]) -> int | None:
    """Return the position of the value that the one at `position` is added to, None if it is used in another way."""

    def current(value: Tensor, before: int) -> int | None:
        known = [p for p in numbers.get(id(value), ()) if p < before]  # work in place makes a new value of the old one
        return known[-1] if known else None

    users = [u for u in counting.uses if any(current(t, u[3]) == position for t in u[1])]
    if len(users) != 1:
        return None
    func, tensors, kwargs, at = users[0]
    if func not in _ADDITIONS or len(tensors) != 2 or kwargs.get("alpha", 1) != 1:
        return None
    if tensors[0].shape != tensors[1].shape or tensors[0] is tensors[1]:
        return None
    places = [current(t, at) for t in tensors]
    return next((p for p in places if p != position), None)


@contextlib.contextmanager
def _watched(
    module: nn.Module,
    names: Collection[str],
    before: Callable[[str], None],
    after: Callable[[str, Tensor], None],
) -> Iterator[None]:
    handles: list[Any] = []
    for name in names:
        layer = module.get_submodule(name)
        handles.append(layer.register_forward_pre_hook(lambda _m, _a, n=name: before(n)))
        handles.append(layer.register_forward_hook(lambda _m, _a, out, n=name: after(n, out)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


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
        except _Abandoned:
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
            raise _Abandoned

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
            here.strand.stand(_Arrival(self._name, _first(args, kwargs), None, here.other(self._name)))
        out = self.layer(*args, **kwargs)
        here.counting.inside = False
        here.counting.made(out)
        return out


def _first(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    found: Tensor = args[0] if args else next(iter(kwargs.values()))
    return found.detach()


def lockstep(
    opened: OpenedModel,
    original: nn.Module,
    copy: nn.Module,
    batches: Sequence[Mapping[str, Tensor]],
    flow: Flow,
    names: Collection[str],
) -> Iterator[Stop]:
    """Yield a stop at each of the layers `names`, which must be called once, in the order of the calls.

    Between two stops the copy's layer, at the path `at_stop(name)`, may be exchanged. Raises `ModelError` where
    two passes do not call the same layers in the same order. The copy has its layers back when this ends.
    """
    here = threading.local()
    wanted = {flow.additions[n] for n in names if n in flow.additions}
    order = [n for n in flow.calls if n in set(names)]
    with _gated(copy, order, here), _stopped(original, order, here):
        strands = [
            (_strand(opened, original, b, here, flow, wanted), _strand(opened, copy, b, here, flow, wanted))
            for b in batches
        ]

        def ahead(name: str, k: int) -> tuple[Tensor, Tensor] | None:
            at = flow.ahead.get(name)
            if at is None:
                return None
            return _run_to(opened, original, batches[k], here, flow, at), _run_to(
                opened, copy, batches[k], here, flow, at
            )

        try:
            for name in order:
                at = [(_expect(a, name), _expect(b, name)) for a, b in strands]
                yield Stop(name, at, functools.partial(ahead, name))
            for strand in (s for pair in strands for s in pair):
                strand.advance()
        finally:
            for strand in (s for pair in strands for s in pair):
                strand.abandon()


def _run_to(
    opened: OpenedModel,
    module: nn.Module,
    inputs: Mapping[str, Tensor],
    here: threading.local,
    flow: Flow,
    position: int,
) -> Tensor:
    """Return the value at `position` of a pass that does not stand still: what lies ahead of the others."""
    counting = Counting({position}, last=position)
    here.now = _Pass(None, counting, flow)
    try:
        with contextlib.suppress(_Abandoned), torch.no_grad(), counting:
            opened.outputs(module, inputs)
    finally:
        here.now = None
    return counting.values[position]


def at_stop(name: str) -> str:
    """Return the path of a layer in the copy while the passes stand still."""
    return f"{name}.layer"


def _expect(strand: _Strand, name: str) -> _Arrival:
    arrival = strand.advance()
    if arrival is None or arrival.layer != name:
        got = "the end" if arrival is None else arrival.layer
        raise ModelError("the model", f"the layer {name} next in every batch", got, "its layers depend on the data")
    return arrival


def _strand(
    opened: OpenedModel, module: nn.Module, inputs: Mapping[str, Tensor], here: threading.local, flow: Flow,
    wanted: Collection[int],
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
def _stopped(original: nn.Module, names: Sequence[str], here: threading.local) -> Iterator[None]:
    """Make the passes through the network itself stand still behind each layer, so that its answer is there too."""

    def enter(_: nn.Module, args: Any) -> None:
        now: _Pass | None = getattr(here, "now", None)
        if now is not None:
            now.counting.inside = True

    def leave(name: str) -> Any:
        def run(_: nn.Module, args: Any, kwargs: Any, out: Tensor) -> None:
            now: _Pass | None = getattr(here, "now", None)
            if now is not None:
                if now.strand is not None:
                    now.strand.stand(_Arrival(name, _first(args, kwargs), out, now.other(name)))
                now.counting.inside = False
                now.counting.made(out)

        return run

    handles: list[Any] = []
    for name in names:
        layer = original.get_submodule(name)
        handles.append(layer.register_forward_pre_hook(enter))
        handles.append(layer.register_forward_hook(leave(name), with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


__all__ = ["Flow", "Pair", "Stop", "at_stop", "flow_of", "lockstep"]
