"""How far a run is, by steps or by the clock, and the rate that belongs to it.

The rate warms up in a line and falls as a cosine; it reaches its end when the steps or the seconds are up, whichever
comes first: a run that the clock ends is not cut in the middle of its schedule.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field

from ..progress import Advance
from .settings import Settings

#: Part of a run's time that evaluations may take, and of its trained samples that they may read.
_JUDGING, _JUDGED = 0.15, 0.5
#: A run in its first half whose loss is so many times that of its start begins again, with a lower rate.
_RUINED = 2.0
#: So does one between these parts that is worse by so much and has gained nothing yet.
_HARM, _SETTLED, _LATE = 0.05, 0.4, 0.75


def harmed(value: float, start: float, place: float, told: str, *, gained: bool) -> bool:
    """Tell whether a rate is too high for a run, by a "loss" or a "score" (lower is better) at a place in 0…1 of it.

    The trials before a run are too short to show that.
    """
    if told == "loss" and place < 0.5 and value > max(_RUINED * start, start + 1e-6):
        return True
    if place >= _LATE or (math.isfinite(value) and (place < _SETTLED or gained)):
        return False
    return not value - start <= _HARM * abs(start)


def evaluations(settings: Settings, per_step: int, selected: int, seconds: float) -> int:
    """Return how often to evaluate: as often as asked for, where that leaves most of the work to training.

    `per_step`: samples of a step, `selected`: of an evaluation, which takes so many seconds.
    """
    most, steps = settings.evaluations, settings.most_steps
    if steps is not None:
        most = min(most, max(2, int(_JUDGED * steps * per_step / selected)))
    if settings.max_seconds is not None:
        most = min(most, max(1, int(_JUDGING * settings.max_seconds / max(seconds, 1e-6))))
    return most


@dataclass
class Clock:
    """Seconds of work, those of earlier processes included."""

    used_seconds: float = 0.0
    _since: float = field(default_factory=time.perf_counter)

    @property
    def seconds(self) -> float:
        return self.used_seconds + time.perf_counter() - self._since

    def restart(self, used_seconds: float) -> None:
        self.used_seconds, self._since = used_seconds, time.perf_counter()


@dataclass(frozen=True)
class Schedule:
    """`steps` and `seconds` at which training ends; None where that does not end it."""

    steps: int | None
    seconds: float | None
    warmup: float

    def position(self, step: int, seconds: float) -> float:
        """Return the part of the run that is done, at least 1 at its end."""
        by_steps = step / self.steps if self.steps is not None else 0.0
        by_clock = seconds / self.seconds if self.seconds is not None else 0.0
        return max(by_steps, by_clock)

    def rate(self, position: float) -> float:
        """Return the share of the highest rate at a position."""
        first = 1 / self.steps if self.steps is not None else 0.005
        if position < self.warmup:
            return min(1.0, (position + first) / self.warmup)
        return 0.5 * (1 + math.cos(math.pi * min(1.0, (position - self.warmup) / (1 - self.warmup))))

    def remaining(self, step: int, seconds: float) -> float:
        """Return the seconds that are left, as the pace so far tells."""
        position = self.position(step, seconds)
        return seconds * (1 / position - 1) if 0 < position < 1 else 0.0


class Shown:
    """Moves a progress bar by steps, or by seconds where the clock ends the run."""

    def __init__(self, advance: Advance, *, by_steps: bool) -> None:
        self._advance, self._by_steps, self._done = advance, by_steps, 0

    def at(self, step: int, seconds: float, note: str) -> None:
        now = step if self._by_steps else int(seconds)
        self._advance(now - self._done, note)
        self._done = now
