"""Record how values run between the layers of a network: in which order these are called, what becomes of their answers.

    flow = flow_of(opened, module, a_few_samples, names)
    flow.once                                        # layers called once, in order
    flow.additions["conv2"]                          # where the value is made that its answer is added to

One small batch is run; every value gets the position of the operation that makes it, which later passes count alike.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from .opened import OpenedModel
from .surgery import find_layers

_ADDITIONS = (torch.ops.aten.add.Tensor, torch.ops.aten.add_.Tensor)
_RECTIFIERS = (torch.ops.aten.relu.default, torch.ops.aten.relu_.default)
#: Where a value is made: how many calls of layers came before, and how many operations since the last of them. What
#: the data decide before a layer (whether there is a mask) moves nothing behind it.
Position = tuple[int, int]
#: An operation of a recorded pass: what it is, its tensors and other arguments, the position of its result.
_Use = tuple[Any, tuple[Tensor, ...], dict[str, Any], Position]


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


class Abandoned(BaseException):
    """Ends a pass whose caller is gone; no code of a model's may catch it as an error of its own."""


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

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Say that nothing here needs hiding from a compiler: PyTorch would import it whole, a second or more."""
        return False

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
            raise Abandoned
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
            layer.register_forward_pre_hook(lambda _m, a, k, n=name: before(n, first_of(a, k)), with_kwargs=True)
        )
        handles.append(layer.register_forward_hook(lambda _m, _a, out, n=name: after(n, out)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def first_of(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    """Return what a layer reads, however it is called."""
    found: Tensor = args[0] if args else next(iter(kwargs.values()))
    return found


__all__ = ["Abandoned", "Counting", "Flow", "Position", "first_of", "flow_of"]
