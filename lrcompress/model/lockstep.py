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
from .surgery import find_layers, set_submodule

_ADDITIONS = (torch.ops.aten.add.Tensor, torch.ops.aten.add_.Tensor)
_RECTIFIERS = (torch.ops.aten.relu.default, torch.ops.aten.relu_.default)
#: Where a value is made: how many calls of layers came before, and how many operations since the last of them. What
#: the data decide before a layer (whether there is a mask) moves nothing behind it.
Position = tuple[int, int]
#: An operation of a recorded pass: what it is, its tensors and other arguments, the position of its result.
_Use = tuple[Any, tuple[Tensor, ...], dict[str, Any], Position]


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
    _ahead: Callable[[int], tuple[Tensor, Tensor] | None]

    def pairs(self) -> Iterator[Pair]:
        """Yield what the layer reads, batch by batch."""
        for k, (clean, drifted) in enumerate(self._at):
            others = self._ahead(k)
            if others is None and clean.other is not None and drifted.other is not None:
                others = clean.other, drifted.other
            assert clean.answer is not None
            # Where the data decide what is computed, another value may stand at that position.
            fits = others is not None and all(o.shape == clean.answer.shape for o in others)
            yield Pair(clean.value, drifted.value, clean.answer, others if fits else None)


@dataclass(frozen=True)
class Flow:
    """How values run between the layers of a network, as one small batch showed it.

    `calls`: the layers in the order they are called, with repetitions. `additions`: layer → position of the value
    that its answer is added to, where that exists before the layer is called; `ahead`: where it comes later.
    `rectified`: layers of whose answer, or of the sum that it goes into, the negative part is cut off next. `counted`:
    everything whose call counts as one operation, whatever stands there.
    """

    calls: tuple[str, ...]
    additions: Mapping[str, Position]
    ahead: Mapping[str, Position]
    rectified: frozenset[str] = frozenset()
    counted: frozenset[str] = frozenset()

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

    def __init__(self, wanted: Collection[Position] | None, *, last: Position | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.position: Position = (0, 0)
        self.inside = False
        self._last = last
        self.values: dict[Position, Tensor] = {}
        self.uses: list[_Use] = []
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
        """Count one operation whose result is `out`, or the first of several (a normalization returns its moments too)."""
        value = out[0] if isinstance(out, tuple) and out else out
        if isinstance(value, Tensor) and (self._wanted is None or self.position in self._wanted):
            self.values[self.position] = value
        if self.position == self._last:
            raise _Abandoned
        self.position = self.position[0], self.position[1] + 1

    def answered(self, out: Any) -> Position:
        """Count one call of a layer, which ends, and return the position of its answer."""
        self.inside = False
        self.position = at = self.position[0] + 1, 0
        self.made(out)
        return at


def flow_of(opened: OpenedModel, module: nn.Module, inputs: Mapping[str, Tensor], names: Collection[str]) -> Flow:
    """Run one small batch and return how the named layers are called and what their answers are added to."""
    counting = Counting(None)
    calls: list[str] = []
    answers: dict[str, Position] = {}
    reads: list[tuple[Tensor, Position]] = []
    counted = frozenset((*names, *(layer.name for layer in find_layers(module))))

    def before(layer: str, read: Tensor) -> None:
        counting.inside = True
        calls.append(layer)
        reads.append((read, counting.position))

    def after(layer: str, out: Tensor) -> None:
        answers[layer] = counting.answered(out)

    with _watched(module, counted, before, after), torch.no_grad(), counting:
        told = opened.outputs(module, inputs)
    reads += [(value, counting.position) for value in told.values()]  # what is told is read, by whoever asked
    calls, answers = [n for n in calls if n in names], {n: p for n, p in answers.items() if n in names}
    numbers: dict[int, list[Position]] = {}
    for position, value in sorted(counting.values.items(), key=lambda item: item[0]):
        numbers.setdefault(id(value), []).append(position)
    additions: dict[str, Position] = {}
    ahead: dict[str, Position] = {}
    rectified = set()
    uses = _Uses(counting, numbers, reads)
    for layer, position in answers.items():
        if calls.count(layer) != 1:
            continue
        added = uses.addition(position)
        if added is not None:
            (additions if added[0] < position else ahead)[layer] = added[0]
        if uses.is_rectified(position if added is None else added[1]):
            rectified.add(layer)
    return Flow(tuple(calls), additions, ahead, frozenset(rectified), counted)


class _Uses:
    """Who uses which value of a recorded pass. Work in place makes a new value of the old one."""

    def __init__(
        self, counting: Counting, numbers: Mapping[int, list[Position]], reads: Sequence[tuple[Tensor, Position]]
    ) -> None:
        self._uses, self._numbers = counting.uses, numbers
        self._read = {self._current(t, at) for t, at in reads}

    def _current(self, value: Tensor, before: Position) -> Position | None:
        known = [p for p in self._numbers.get(id(value), ()) if p < before]
        return known[-1] if known else None

    def _only(self, position: Position) -> _Use | None:
        """Return the one operation that uses a value, None where there are several or a layer reads it."""
        users = [u for u in self._uses if any(self._current(t, u[3]) == position for t in u[1])]
        return users[0] if len(users) == 1 and position not in self._read else None

    def addition(self, position: Position) -> tuple[Position, Position] | None:
        """Return the positions of what a value is added to and of the sum; None if it is used in another way."""
        user = self._only(position)
        if user is None:
            return None
        func, tensors, kwargs, at = user
        if func not in _ADDITIONS or len(tensors) != 2 or kwargs.get("alpha", 1) != 1:
            return None
        if tensors[0].shape != tensors[1].shape or tensors[0] is tensors[1]:
            return None
        other = next((p for p in (self._current(t, at) for t in tensors) if p != position), None)
        return None if other is None else (other, at)

    def is_rectified(self, position: Position) -> bool:
        """Return whether all that happens to a value is that its negative part is cut off."""
        user = self._only(position)
        return user is not None and user[0] in _RECTIFIERS


@contextlib.contextmanager
def _watched(
    module: nn.Module,
    names: Collection[str],
    before: Callable[[str, Tensor], None],
    after: Callable[[str, Tensor], None],
) -> Iterator[None]:
    handles: list[Any] = []
    for name in names:
        layer = module.get_submodule(name)
        handles.append(
            layer.register_forward_pre_hook(lambda _m, a, k, n=name: before(n, _first(a, k)), with_kwargs=True)
        )
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
        here.counting.answered(out)
        return out


def _first(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    found: Tensor = args[0] if args else next(iter(kwargs.values()))
    return found


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
    others = sorted(flow.counted - set(order))
    with _gated(copy, order, here), _hooked(original, order, others, here), _hooked(copy, (), others, here):
        strands = [
            (_strand(opened, original, b, here, flow, wanted), _strand(opened, copy, b, here, flow, wanted))
            for b in batches
        ]

        def ahead(name: str, k: int) -> tuple[Tensor, Tensor] | None:
            at = flow.ahead.get(name)
            if at is None:
                return None
            clean, drifted = (_run_to(opened, m, batches[k], here, flow, at) for m in (original, copy))
            return None if clean is None or drifted is None else (clean, drifted)

        try:
            for name in order:
                at = [(_expect(a, name), _expect(b, name)) for a, b in strands]
                yield Stop(name, at, functools.partial(ahead, name))
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
        with contextlib.suppress(_Abandoned), torch.no_grad(), counting:
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
                    now.strand.stand(_Arrival(name, _first(args, kwargs), out, now.other(name)))
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
