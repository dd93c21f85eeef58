"""How to train, and what came out: frozen values, checked once."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..errors import CommandError
from .losses import AUTO

#: Steps where neither steps nor seconds are given.
STEPS = 400
TRAINED = ("adapters", "factors")
PRECISIONS = ("auto", "fp32", "bf16")


@dataclass(frozen=True)
class Settings:
    """How to train. `max_seconds` ends the schedule when they are up and makes the result depend on the machine.

    `loss`: weight by term. `learning_rate`: None searches for one. `batch_size` counts samples of all processes
    together, `accumulate` the pieces a process runs its share in. `patience`: evaluations without a better state until
    training ends, 0 for never. `temperature`: None for what fits the answers. `mix`: blend samples; None where that can
    be done. `hidden`: module paths (fnmatch) of that loss; none: the blocks of the network.
    """

    loss: Mapping[str, float] = field(default_factory=lambda: {AUTO: 1.0})
    steps: int | None = None
    batch_size: int = 64
    accumulate: int = 1
    learning_rate: float | None = None
    warmup: float = 0.05
    weight_decay: float = 0.0
    evaluations: int = 12
    patience: int = 0
    max_seconds: float | None = None
    seed: int = 0
    temperature: float | None = None
    hidden: tuple[str, ...] = ()
    augment: bool = False
    mix: bool | None = None
    checkpointing: bool = False
    precision: str = "auto"
    save_seconds: float = 30.0

    def __post_init__(self) -> None:
        where = "lrcompress recover"
        for name, value in (
            ("--steps", self.steps),
            ("--batch-size", self.batch_size),
            ("--accumulate", self.accumulate),
        ):
            if value is not None and value < 1:
                raise CommandError(f"{where} {name}", "a whole number of at least 1", value)
        for name, number in (
            ("--lr", self.learning_rate),
            ("--max-seconds", self.max_seconds),
        ):
            if number is not None and not (math.isfinite(number) and number > 0):
                raise CommandError(f"{where} {name}", "a number above 0", number)
        if self.temperature is not None and not self.temperature > 0:
            raise CommandError(f"{where} --temperature", "a number above 0, inf or auto", self.temperature)
        if self.patience < 0:
            raise CommandError(f"{where} --patience", "a whole number of at least 0", self.patience)
        if not (math.isfinite(self.weight_decay) and self.weight_decay >= 0):
            raise CommandError(f"{where} --weight-decay", "a number of at least 0", self.weight_decay)
        if self.precision not in PRECISIONS:
            raise CommandError(f"{where} --precision", f"one of {', '.join(PRECISIONS)}", self.precision)

    @property
    def most_steps(self) -> int | None:
        """Steps at which training ends; None where only the clock ends it."""
        return self.steps if self.steps is not None or self.max_seconds is not None else STEPS

    def deciding(self) -> dict[str, Any]:
        """Return what the result depends on, as plain values."""
        plain = {k: v for k, v in self.__dict__.items() if k != "save_seconds"}
        # JSON has no infinity.
        return {**plain, "loss": dict(self.loss), "hidden": list(self.hidden), "temperature": str(self.temperature)}


@dataclass(frozen=True)
class Outcome:
    """What training found: losses on `select` at the start and at the kept state, and the step it was found at.

    `rates`: what the search for a learning rate saw, {rate: score}. `stopped`: why training ended: steps, time, patience.
    """

    start_loss: float
    best_loss: float
    best_step: int
    steps: int
    seconds: float
    history: tuple[tuple[int, float], ...]
    learning_rate: float
    rates: tuple[tuple[float, float], ...]
    stopped: str
    resumed_at: int | None = None
