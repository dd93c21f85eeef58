"""The loss of a batch and of a data set: what the student answers against the teacher's answers and the labels."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..data import Data
from ..errors import DataError, ModelError
from ..model import tensors_of
from . import losses
from .blocks import captured
from .teacher import KEPT_BYTES, Answers
from .world import World

ANSWER = "answer"
#: Samples whose teacher's answers the energies are measured on.
_MEASURED = 256
Forward = Callable[[Mapping[str, Tensor]], Tensor]


class Asked:
    """Asks a network: its answer, and the hidden states of the named modules, in float32 or wider.

    `precision`: what is computed in where a call does not say `exact`; None: as the weights are.
    """

    def __init__(
        self, forward: Forward, hidden: Sequence[str], held: dict[str, Tensor], precision: torch.dtype | None
    ) -> None:
        self._forward, self._hidden, self._held, self._precision = forward, hidden, held, precision

    def __call__(self, inputs: Mapping[str, Tensor], *, exact: bool = False) -> Answers:
        self._held.clear()
        cast = None if exact else self._precision
        where = next(iter(inputs.values())).device.type
        with torch.autocast(where, cast or torch.bfloat16, enabled=cast is not None):
            answers = {ANSWER: self._forward(inputs)}
        silent = next((n for n in self._hidden if n not in self._held), None)
        if silent is not None:
            what = "a module that answers with a tensor"
            raise ModelError(f"hidden states: {silent}", what, "none", "name others with --hidden")
        answers |= {n: self._held[n] for n in self._hidden}
        return {n: a.float() if a.dtype in (torch.float16, torch.bfloat16) else a for n, a in answers.items()}


@dataclass(frozen=True)
class Networks:
    """Whom to ask. `lockstep`: the teacher is spread over the processes, which must all ask it together."""

    student: Asked
    teacher: Asked | None
    lockstep: bool = False


@contextlib.contextmanager
def asking(
    forward: Forward, module: nn.Module, hidden: Sequence[str], precision: torch.dtype | None
) -> Iterator[Asked]:
    """Yield what asks `module` through `forward`, and listens to the named modules in it."""
    with captured(module, hidden) as held:
        yield Asked(forward, hidden, held, precision)


def laid_out(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return inputs with the channels of images last, which is how convolutions like them."""
    return {
        n: v.contiguous(memory_format=torch.channels_last) if v.dim() == 4 and v.is_floating_point() else v
        for n, v in inputs.items()
    }


@dataclass
class Objective:
    """The weighted terms of a loss. `energies`: E of what a distance is relative to, measured once."""

    mix: Mapping[str, float]
    temperature: float
    hidden: Sequence[str]
    energies: dict[str, float]

    @property
    def needs_teacher(self) -> bool:
        return set(self.mix) != {"labels"}

    def measure(self, teacher: Answers, inputs: Mapping[str, Tensor]) -> None:
        """Take the energies from answers of the teacher."""
        for name, answer in teacher.items():
            self.energies[name] = losses.energy_of(answer, mask_of(inputs, answer), rows=name == ANSWER)

    def per_sample(
        self, student: Answers, teacher: Answers | None, labels: object, inputs: Mapping[str, Tensor]
    ) -> Tensor:
        """Return the loss of each sample. Raises `DataError` for labels that are missing or no classes."""
        answer = student[ANSWER]
        mask, total = mask_of(inputs, answer), None
        for name, weight in self.mix.items():
            term = self._term(name, student, teacher, labels, inputs, mask)
            total = weight * term if total is None else total + weight * term
        assert total is not None
        return total

    def _term(
        self, name: str, student: Answers, teacher: Answers | None, labels: object, inputs: Mapping[str, Tensor],
        mask: Tensor | None,
    ) -> Tensor:  # fmt: skip
        answer = student[ANSWER]
        if name == "labels":
            return losses.labels(answer, losses.checked_labels(labels, answer), mask)
        assert teacher is not None
        if name == "logits":
            return losses.logits(answer, teacher[ANSWER], mask, temperature=self.temperature)
        if name == "embedding":
            return losses.embedding(answer, teacher[ANSWER], mask, energy=self.energies[ANSWER])
        parts = [
            losses.hidden(student[n], teacher[n], mask_of(inputs, student[n]), energy=self.energies[n])
            for n in self.hidden
        ]
        return torch.stack(parts).mean(0)


def mask_of(inputs: Mapping[str, Tensor], answer: Tensor) -> Tensor | None:
    """Return which positions of `answer` (batch, positions, …) are real, where the inputs tell."""
    mask = inputs.get("attention_mask")
    return mask if mask is not None and answer.dim() >= 2 and mask.shape == answer.shape[:2] else None


class Held:
    """The mean loss on held-out data, in full precision; the teacher answers each batch of it once only, and the batches are shared out."""

    def __init__(
        self, objective: Objective, student: Asked, teacher: Asked | None, data: Data, batch_size: int, world: World
    ) -> None:
        self._objective, self._student, self._teacher, self._world = objective, student, teacher, world
        self._room_bytes = KEPT_BYTES
        batches, self._size = [], 0
        for b in data.batches(batch_size):
            rows = slice(self._size, self._size + len(next(iter(b.inputs.values()))))
            batches.append((laid_out(tensors_of(b.inputs, world.device)), b.labels, rows))
            self._size = rows.stop
        rounds = -(-len(batches) // world.size)
        # All processes ask the teacher equally often: it may be spread over them. A turn too many weighs nothing.
        turns = [world.rank + i * world.size for i in range(rounds)]
        self._mine = [(*batches[min(t, len(batches) - 1)], t < len(batches)) for t in turns]
        with torch.no_grad():
            self._known = [self._ask(inputs) for inputs, *_ in self._mine]
            if teacher is not None:
                first = {k: v[:_MEASURED] for k, v in batches[0][0].items()}
                objective.measure(teacher(first, exact=True), first)

    def _ask(self, inputs: Mapping[str, Tensor]) -> Answers | None:
        """Return the teacher's answers while there is room for them; later ones are asked for again every time."""
        if self._teacher is None or self._room_bytes <= 0:
            return None
        answers = self._teacher(inputs, exact=True)
        self._room_bytes -= sum(a.nbytes for a in answers.values())
        return answers

    def losses(self) -> Tensor:
        """Return the loss of each sample (samples,), in every process those of all."""
        found = torch.zeros(self._size, dtype=torch.float64, device=self._world.device)
        with torch.no_grad():
            for (inputs, labels, rows, counts), known in zip(self._mine, self._known, strict=True):
                if known is None and self._teacher is not None:
                    known = self._teacher(inputs, exact=True)
                if counts:
                    answers = self._student(inputs, exact=True)
                    found[rows] = self._objective.per_sample(answers, known, labels, inputs).double()
        return self._world.sum(found)

    def mean(self) -> float:
        return float(self.losses().mean())


def check_inputs(inputs: Mapping[str, Tensor], where: str) -> None:
    """Raise `DataError` for inputs that nothing can be learnt from."""
    bad = next((n for n, v in inputs.items() if v.is_floating_point() and not bool(torch.isfinite(v).all())), None)
    if bad is not None:
        raise DataError(
            f"recovery data at {where}: {bad}", "finite inputs", "NaN or infinity", "take these samples out"
        )
