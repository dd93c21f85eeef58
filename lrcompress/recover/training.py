"""The training loop of recovery: the best state on held-out data is what remains (`keeping`), the start being one.

Everything random comes from the seed: the same seed, data and thread count give the same bytes, however often the run
is broken off and goes on, unless `max_seconds` ends it. Processes share every batch; their gradients are summed and
divided by the samples of the whole batch, so that one process and several take the same steps up to rounding.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..data import Data
from ..errors import DataError, ModelError
from ..model import tensors_of
from ..progress import Progress, Silent
from ..work.jobs import Packed
from .keeping import Score, Seen, clearly_worse
from .logs import Log, NoLog
from .mixing import Mix
from .objective import Held, Networks, Objective, check_inputs, laid_out
from .order import Augment, Order, read_units, width_of
from .schedule import Clock, Schedule, Shown, evaluations, harmed
from .settings import Outcome, Settings
from .state import Saved, State
from .teacher import Teacher
from .trained import Trained
from .whitening import Whitened
from .world import World

#: How often a run of so many steps is begun again.
_AGAIN = 3
#: The longest gradient that is followed as it is.
_LONGEST = 1.0


class Diverged(ModelError):
    """The loss is no number any more: the rate is too high."""


@dataclass
class Training:
    """One run. `score` decides, and the loss where it is equal; None: the mean loss on `select`.

    `finish` is called on the best state and may change the network in a way that leaves its answers: it is judged again.
    """

    trained: Trained
    networks: Networks
    objective: Objective
    train_data: Data
    select_data: Data
    settings: Settings
    world: World = field(default_factory=World)
    score: Score | None = None
    saved: Saved | None = None
    progress: Progress = field(default_factory=Silent)
    log: Log = field(default_factory=NoLog)
    finish: Callable[[], None] | None = None
    clock: Clock = field(default_factory=Clock)
    #: Batches whose gradients the optimizer has seen before it takes its first step: one that knows no gradient but its
    #: first steps by signs alone, which shakes a network that is nearly right.
    foreseen: int = 0
    #: Called once, where a run begins: it may change what is trained in a way that leaves the network's answers.
    prepare: Callable[[Training], None] | None = None

    def __post_init__(self) -> None:
        s, data = self.settings, self.train_data
        if len(data) == 0 or len(self.select_data) == 0:
            got = f"{len(data)} and {len(self.select_data)}"
            raise DataError("recovery data", "samples to train on and to select on", got)
        self.order = Order.of(data, s.batch_size, s.seed)
        self.changes: list[Augment | Mix] = [Augment.of(data, s.seed)] if s.augment else []
        if s.mix:
            self.changes.append(Mix(data, s.seed))
        self.parameters = list(self.trained.parameters.values())
        self.state = State()
        self._known: dict[str, dict[str, Any]] = {}
        self.seen: Seen = {}

    def run(self, find_rate: Callable[[Training], None]) -> Outcome:
        """Train, and leave the parameters in their best state on `select`. `find_rate` fills in the state's rate.

        Raises `ModelError` for a loss that is not finite, `DataError` for labels or inputs that cannot be learnt from.
        """
        with torch.random.fork_rng():
            torch.manual_seed(self.settings.seed)
            return self._run(find_rate)

    def judge(self) -> float:
        """Return the loss of the network as it is; nothing is trained."""
        self._look()
        return float(self.world.from_first(self.held.mean()))

    def gradient(self, batches: int) -> None:
        """Leave in the parameters the mean gradient of the first so many batches."""
        self.teacher = self._teacher()
        self._look()
        first = self.order.epoch(0)[:batches]
        self.gradients(first, self.parameters, name="the first batches")
        for p in self.parameters:
            if p.grad is not None:
                p.grad.div_(len(first))

    def gradients(
        self, batches: Sequence[np.ndarray], parameters: Sequence[nn.Parameter], epoch: int = 0, *, name: str
    ) -> tuple[float, float]:
        """Leave in `parameters` the sum of all processes' gradients on batches; return the loss, summed, and the
        seconds of the first process.
        """
        for p in parameters:
            p.grad = None
        loss, error = 0.0, None
        try:
            for units in batches:
                loss += self._gradients(units, epoch, name)
        except Exception as e:
            error = e
        loss, seconds = self.world.sum_gradients(parameters, (loss, self.clock.seconds * self.world.first), error)
        return loss, seconds

    def _look(self) -> None:
        with self.world.together():
            net = self.networks
            self.held = Held(self.objective, net.student, net.teacher, self.select_data, _EVALUATED, self.world)

    def _run(self, find_rate: Callable[[Training], None]) -> Outcome:
        self.teacher = self._teacher()
        self._look()
        self.begin()
        self._foresee()
        resumed = self._resume()
        if resumed is None:
            if self.prepare is not None:
                self.prepare(self)
            self._start()
        if self.state.rate is None:
            find_rate(self)
            self._save()
        stopped = self._loop()
        self._restore(self.state.kept)
        s = self.state
        if self.finish is not None and s.best_step > 0:
            self.finish()
            s.best = self.decide()
            s.best_loss = self._loss(s.best)
            if not (s.best, s.best_loss) < (s.start, s.start_loss):  # rounding took back what was won
                s.best, s.best_loss, s.best_step = s.start, s.start_loss, 0
        return Outcome(
            s.start_loss, s.best_loss, s.best_step, s.step, self.clock.seconds, tuple((a, b) for a, b in s.history), s.rate or 0.0,
            tuple((a, b) for a, b in s.rates), stopped, resumed,
        )  # fmt: skip

    # the parts of a run ---------------------------------------------------------------------------------------------

    def begin(self) -> None:
        """Make an optimizer that knows what was foreseen, and nothing else."""
        t = self.trained
        self.optimizer = Whitened(t.parameters, t.scales, t.roots, weight_decay=self.settings.weight_decay)
        for name, state in self._known.items():
            self.optimizer.put_state(name, {k: v.clone() for k, v in state.items()})

    def _foresee(self) -> None:
        """Show the optimizer gradients of the start, which is also where a run that goes on looks from."""
        batches = self.order.epoch(0)
        for i in range(self.foreseen):
            self.step(batches[i % len(batches)], 0, 0.0, 0.0, name="look ahead")
        if self.foreseen:
            self._known = {n: self.optimizer.state_of(n) for n in self.trained.parameters}
            self.begin()

    def restart(self) -> None:
        """Go back to the start, with a fresh optimizer."""
        self._restore(self.state.kept)
        self.begin()

    def decide(self) -> float:
        """Return what decides about the present state: the same number in every process."""
        self.seen = {}
        if self.score is None:
            return float(self.world.from_first(self.held.mean()))
        value = float(self.world.from_first(self.score.decide()))
        self.seen["score"] = self.score.numbers
        return value

    def _loss(self, decided: float) -> float:
        """Return the loss of the state that this was decided about: what decides between equal scores."""
        if self.score is None:
            return decided
        losses = self.held.losses()
        if self.seen:
            self.seen["loss"] = losses.cpu()
        return float(losses.mean())

    def _start(self) -> None:
        before = time.perf_counter()
        value = self.decide()
        if not math.isfinite(value):
            raise ModelError(
                "recovery: the start", "a finite loss on the held-out data", value, "check the model and the data"
            )
        self.state.start = self.state.best = value
        self.state.start_loss = self.state.best_loss = self._loss(value)
        self.state.reserve_seconds = self.world.from_first(time.perf_counter() - before)
        self.state.top, self.state.top_loss, self.state.seen = value, self.state.start_loss, self.seen
        self.state.history = [(0, value)]
        self.state.kept = self._copies()
        samples = self.order.per_batch * width_of(self.train_data)
        self.state.evaluations = evaluations(self.settings, samples, len(self.select_data), self.state.reserve_seconds)

    @property
    def schedule(self) -> Schedule:
        s = self.settings
        reserve = min(self.state.reserve_seconds, 0.25 * (s.max_seconds or 0.0))
        return Schedule(s.most_steps, None if s.max_seconds is None else s.max_seconds - reserve, s.warmup)

    def _loop(self) -> str:
        state, schedule, s = self.state, self.schedule, self.settings
        total, saved_at = s.most_steps, time.perf_counter()
        with self.progress.task("recover", total=total or round(s.max_seconds or 0)) as advance:
            shown = Shown(advance, by_steps=total is not None)
            shown.at(state.step, self.clock.seconds, "")
            while True:
                batches, begun = self.order.epoch(state.epoch), state.begun
                for units in batches[state.position :]:
                    if state.begun > begun:
                        break
                    try:
                        loss, seconds = self.step(
                            units, state.epoch, state.rate or 0.0, schedule.rate(self._place(schedule))
                        )
                    except Diverged:
                        if s.learning_rate is not None:
                            raise
                        self._lower()
                        loss, seconds = math.nan, self.world.from_first(self.clock.seconds)
                        if state.begun > begun:
                            continue
                    state.step, state.position = state.step + 1, state.position + 1
                    state.seconds = seconds
                    place = self._place(schedule)
                    note = f"loss {loss:.4f}, eta {schedule.remaining(state.step, seconds):.0f} s"
                    shown.at(state.step, seconds, note)
                    self.log.add_scalar("loss/train", loss, state.step)
                    if place >= 1 or math.floor(place * state.evaluations) > state.done_evaluations:
                        self._evaluate(place)
                        if s.patience and state.since_best >= s.patience:
                            return "patience"
                    if place >= 1:
                        return "steps" if total is not None and state.step >= total else "time"
                    if time.perf_counter() - saved_at >= s.save_seconds:
                        self._save()
                        saved_at = time.perf_counter()
                if state.begun == begun:
                    state.epoch, state.position = state.epoch + 1, 0

    def _place(self, schedule: Schedule) -> float:
        return schedule.position(self.state.step, self.state.seconds)

    def _evaluate(self, place: float) -> None:
        state = self.state
        value = self.decide()
        state.done_evaluations = math.floor(min(place, 1.0) * state.evaluations)
        state.history.append((state.step, value))
        self.log.add_scalar("loss/select" if self.score is None else "score/select", value, state.step)
        state.since_best += 1
        worse = not value <= state.top and self._clearly_worse("score")
        if -math.inf < value <= state.start and not worse:
            self._offer(value, self._loss(value))
        told = "loss" if self.score is None else "score"
        harm = worse and harmed(value, state.start, place, told, gained=state.best_step > 0)
        if self.settings.learning_rate is None and harm:
            self._lower()

    def _offer(self, value: float, loss: float) -> None:
        """Keep the present state if it is the best so far, or later and not clearly worse than that (`keeping`)."""
        state = self.state
        # Few samples are often answered equally well by states of which one is surer.
        if (value, loss) < (state.top, state.top_loss):
            state.top, state.top_loss, state.seen, state.since_best = value, loss, self.seen, 0
        elif not (value, loss) < (state.start, state.start_loss) or self._clearly_worse("loss"):
            return
        state.best, state.best_loss, state.best_step = value, loss, state.step
        state.kept = self._copies()

    def _clearly_worse(self, by: str) -> bool:
        return bool(self.world.from_first(clearly_worse(by, self.seen, self.state.seen, self.score)))

    def _lower(self) -> None:
        """Go on from the best state at a lower rate; all over again where nothing was gained and no clock is running."""
        state = self.state
        state.rate = (state.rate or 0.0) / math.sqrt(10)
        self.restart()
        if self.settings.max_seconds is None and state.best_step == 0 and state.begun < _AGAIN:
            state.begun += 1
            state.step = state.epoch = state.position = state.done_evaluations = state.since_best = 0
            state.history = state.history[:1]

    # one step -------------------------------------------------------------------------------------------------------

    def step(
        self, units: np.ndarray, epoch: int, rate: float, share: float, *, name: str = "step"
    ) -> tuple[float, float]:
        """Take one step on a batch of all processes; return its loss, and the seconds of the first process."""
        loss, seconds = self.gradients([units], self.parameters, epoch, name=f"{name} {self.state.step + 1}")
        if not math.isfinite(loss):
            raise Diverged(
                "recovery", "a finite loss", f"{loss} at {name} {self.state.step + 1}", "lower the learning rate: --lr"
            )
        self.optimizer.step(rate * share, _LONGEST)
        return loss, seconds

    def _gradients(self, units: np.ndarray, epoch: int, where: str) -> float:
        """Add the gradients of this process's share, divided by the samples of the whole batch; return its loss."""
        samples, total = len(units) * width_of(self.train_data), 0.0
        for piece in self._pieces(units):
            if len(piece) == 0:
                if self.networks.lockstep and self.networks.teacher is not None:
                    self.networks.teacher(self._read(units[:1]))
                continue
            batch = read_units(self.train_data, piece)
            inputs = tensors_of(batch.inputs, self.world.device)
            for change in self.changes:
                inputs = change(inputs, piece, epoch)
            inputs = laid_out(inputs)
            known = None
            if self.teacher is not None:
                with torch.no_grad():
                    known = self.teacher.answers(piece, inputs)
            loss = self.objective.per_sample(self.networks.student(inputs), known, batch.labels, inputs).sum() / samples
            if not torch.isfinite(loss):
                check_inputs(inputs, where)
            loss.backward()  # type: ignore[no-untyped-call]
            total += float(loss.detach())
        return total

    def _pieces(self, units: np.ndarray) -> list[np.ndarray]:
        return np.array_split(units[self.world.rank :: self.world.size], self.settings.accumulate)

    # the teacher, and what is kept ------------------------------------------------------------------------------------

    def _teacher(self) -> Teacher | None:
        net = self.networks
        if net.teacher is None:
            return None
        keep = not self.changes and not net.lockstep
        # What is asked once is asked exactly.
        ask = partial(net.teacher, exact=keep)
        # Those of all processes: later epochs bring samples that were other processes' first.
        first = [
            p for units in self.order.epoch(0) for r in range(self.world.size)
            for p in np.array_split(units[r :: self.world.size], self.settings.accumulate) if len(p)
        ]  # fmt: skip
        return Teacher(ask, self._read, first, units=self.order.units, width=width_of(self.train_data), keep=keep)

    def _read(self, units: np.ndarray) -> Mapping[str, Tensor]:
        return laid_out(tensors_of(read_units(self.train_data, units).inputs, self.world.device))

    def _copies(self) -> dict[str, Tensor]:
        return {n: p.detach().clone() for n, p in self.trained.parameters.items()}

    def _restore(self, kept: Mapping[str, Tensor]) -> None:
        with torch.no_grad():
            for name, p in self.trained.parameters.items():
                p.copy_(kept[name])

    def _save(self) -> None:
        if self.saved is None:
            return
        self.state.seconds = self.clock.seconds
        if self.teacher is not None:
            self.state.teacher_kept = self.teacher.kept.usable
        self.saved.save(self.state.pack(self.trained.parameters, self.optimizer))

    def _resume(self) -> int | None:
        """Take up a state that was kept; return the step it was at."""
        packed = self.saved.load() if self.saved is not None else None
        about = self.world.from_first(None if packed is None else packed.about)
        if about is None:
            return None
        tensors = self.world.tensors_from_first({} if packed is None else packed.tensors)
        self.state = State.unpack(Packed(tensors, about), self.trained.parameters, self.optimizer)
        self.clock.restart(self.state.seconds)
        if self.teacher is not None and not self.state.teacher_kept:
            self.teacher.kept.drop()
        return self.state.step


#: Samples of the held-out data that are judged together.
_EVALUATED = 250
