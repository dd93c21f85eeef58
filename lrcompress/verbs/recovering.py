"""What `recover` works on: the network and its original, what is trained of it, samples, and what decides."""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from functools import partial
from typing import Any, TypedDict

import numpy as np
import torch
from torch import Tensor, nn

from .. import metrics
from ..adapt import BaseAdapter, adapter_class, kinds
from ..adapt.core import why_none
from ..data import Data
from ..encodings import as_stored
from ..errors import CommandError
from ..model import OpenedModel, tensors_of
from ..model.adapting import by_pattern, fresh, layer_target, takes
from ..model.checkpoint import Compressed
from ..model.surgery import adaptable_layers, attach, factorized_layers, wrap_dense
from ..progress import Progress, Silent
from ..recover import Networks, Outcome, Saved, Settings, Trained, Training, World, losses, mixing, trained
from ..recover.blocks import checkpointed, hidden_states, rebuilt_kernels
from ..recover.logs import Log, NoLog
from ..recover.objective import Objective, asking, laid_out
from ..recover.order import Order, read_units, width_of
from ..recover.rates import find_rate
from ..recover.schedule import Clock
from ..recover.settings import TRAINED
from ..recover.sharding import shard
from ..recover.turning import turn
from .holding import split
from .scoring import Scorer

#: Where the search for a rate begins: absolute for adapters, relative to a factor's size in white coordinates for factors.
CENTRES = {"adapters": 3e-3, "factors": 3e-3}
#: Batches that an optimizer of factors sees before its first step. (An adapter's first gradients are zero in part.)
_FORESEEN = 8
#: Samples that factors are whitened by.
_LISTENED = 256


class TrainingOptions(TypedDict, total=False):
    """How to train: see `lrcompress.recover.Settings`. `loss` is text such as "logits=1,labels=0.5"."""

    loss: str
    steps: int | None
    batch_size: int
    accumulate: int
    learning_rate: float | str | None
    warmup: float
    weight_decay: float
    evaluations: int
    patience: int
    max_seconds: float | None
    temperature: float | str | None
    hidden: tuple[str, ...]
    augment: bool
    mix: bool | None
    checkpointing: bool
    precision: str
    save_seconds: float


def settings_of(options: TrainingOptions, seed: int) -> Settings:
    """Check options and return them as settings; `CommandError` names the first that is wrong."""
    plain: dict[str, Any] = dict(options)
    rate = _or_auto(plain.pop("learning_rate", None), "--lr", "auto, or a number above 0")
    temperature = _or_auto(plain.pop("temperature", None), "--temperature", "auto, inf, or a number above 0")
    mix = losses.parse(plain.pop("loss", losses.AUTO))
    hidden = tuple(plain.pop("hidden", ()))
    if hidden and "hidden" not in mix:
        raise CommandError(
            "lrcompress recover --hidden", "the loss hidden", ",".join(mix), "add it: --loss auto=1,hidden=1"
        )
    return Settings(loss=mix, learning_rate=rate, temperature=temperature, hidden=hidden, seed=seed, **plain)


def _or_auto(value: float | str | None, option: str, expected: str) -> float | None:
    if not isinstance(value, str):
        return value
    try:
        return None if value == "auto" else float(value)
    except ValueError as e:
        raise CommandError(f"lrcompress recover {option}", expected, value) from e


@dataclass(frozen=True)
class Asked:
    """What is to be trained: the factors, or adapters of a kind, with ranks and alphas by layer pattern."""

    train: str = "adapters"
    kind: str = "lora"
    rank: int = 8
    alpha: float | None = None
    ranks: Mapping[str, int] = field(default_factory=dict)
    alphas: Mapping[str, float] = field(default_factory=dict)
    name: str = "recover"
    include: tuple[str, ...] = ()
    rslora: bool = False
    dora: bool = False

    def __post_init__(self) -> None:
        where = "lrcompress recover"
        if self.train not in TRAINED:
            raise CommandError(f"{where} --train", " or ".join(TRAINED), self.train)
        if self.kind not in kinds():
            raise CommandError(f"{where} --adapter", f"one of {', '.join(kinds())}", self.kind)
        for option in ("rslora", "dora"):
            if getattr(self, option) and (self.train, self.kind) != ("adapters", "lora"):
                got = self.train if self.train == "factors" else self.kind
                raise CommandError(f"{where} --{option}", "--adapter lora", got, "it is an option of LoRA")
        if self.rank < 1:
            raise CommandError(f"{where} --rank", "a whole number of at least 1", self.rank)
        if not self.name.replace("-", "_").isidentifier():
            raise CommandError(f"{where} --name", "letters, digits, - and _", self.name)

    def as_dict(self) -> dict[str, Any]:
        return {
            **self.__dict__,
            "ranks": list(self.ranks.items()),
            "alphas": list(self.alphas.items()),
            "include": list(self.include),
        }


@dataclass
class Job:
    """All that a run needs. `module` is the student, with adapters attached; `teacher` the original, where it is asked."""

    base: Compressed
    module: nn.Module
    teacher: OpenedModel | None
    asked: Asked
    settings: Settings
    train_data: Data
    select_data: Data
    world: World
    scorer: Scorer
    adapters: dict[str, BaseAdapter]
    trained: Trained
    numbers: int
    hidden: list[str]
    forms: dict[str, str]
    lockstep: bool = False
    closed: str = "off"
    #: What adapters are rounded to when they are trained: an encoding of payloads.
    encoding: str | None = None

    def finish(self) -> None:
        """Put trained factors into the gauge that the checkpoint keeps."""
        trained.to_own_gauge(self.module, self.forms)

    def restrict(self) -> None:
        """Go on with `adapters` as they are now: some may have gone. Weight-decomposed ones keep the norms they have now."""
        if self.asked.dora:
            for name, a in self.adapters.items():
                a.decompose(wrap_dense(self.module, name).weight, layer_target(self.module, name).output_axis)
        self.trained = trained.adapters_of(self.adapters)
        self.numbers = self.trained.numbers

    def deciding(self) -> dict[str, Any]:
        """Return everything that the result depends on."""
        return {
            "base": self.base.digest, "model": self.base.spec.get("model"), "asked": self.asked.as_dict(),
            "settings": self.settings.deciding(), "train": self.train_data.digest(), "select": self.select_data.digest(),
            "metric": self.scorer.name if self.scorer.decides else None,
            "original": None if self.teacher is None else self.teacher.digest, "processes": self.world.size,
            "device": self.world.device, "threads": torch.get_num_threads(), "torch": torch.__version__,
            "lockstep": self.lockstep, "closed": self.closed, "encoding": self.encoding,
        }  # fmt: skip


def prepare(
    base: Compressed, teacher: OpenedModel | None, asked: Asked, settings: Settings, data: tuple[Data, Data | None], *,
    metric: str | None, world: World, shard_teacher: bool,
) -> Job:  # fmt: skip
    """Put together what a run needs; everything that can be wrong with it is said here."""
    module = copy.deepcopy(base.need_module("recover"))
    train_data, select_data = split(*data)
    adapters: dict[str, BaseAdapter] = {}
    forms: dict[str, str] = {}
    if asked.train == "adapters":
        adapters = attached(module, asked, settings.seed)
        what = trained.adapters_of(adapters)
        numbers = what.numbers
    else:
        numbers = trained.factors_of(module).numbers
        forms = trained.to_plain_gauge(module)
        what = trained.factors_of(module)
    module.to(world.device)
    name, answer = _first_answer(base.opened, module, train_data, world.device)
    mix = losses.resolved(settings.loss, losses.auto(name, answer))
    temperature = settings.temperature or losses.temperature_for(answer)
    settings = replace(
        settings, loss=mix, temperature=temperature,
        mix=mixing.wanted(settings.mix, train_data, labels="labels" in mix),
    )  # fmt: skip
    hidden = hidden_states(module, settings.hidden, base.spec.get("folded", {})) if "hidden" in mix else []
    if teacher is not None and teacher.module is not None:
        teacher.module.to(world.device).eval()
        if shard_teacher:
            shard(teacher.module, world)
    scorer = Scorer.of(metric, base.opened, module, teacher, select_data, world.device)
    return Job(
        base, module, teacher, asked, settings, train_data, select_data, world, scorer, adapters, what, numbers, hidden, forms,
        shard_teacher,
    )  # fmt: skip


def train(job: Job, *, saved: Saved | None, log: Log, progress: Progress) -> Outcome:
    """Train what the job says in place; adapters are rounded to its encoding, if it has one."""
    fresh = {n: copy.deepcopy(a.state_dict()) for n, a in job.adapters.items()} if job.encoding else {}
    with ready(job, saved, log, progress) as training:
        outcome = training.run(
            lambda t: find_rate(t, CENTRES[job.asked.train], descending=job.asked.train == "factors")
        )
    return outcome if job.encoding is None else _as_stored(job, job.encoding, outcome, fresh)


def _as_stored(job: Job, encoding: str, outcome: Outcome, fresh: Mapping[str, Mapping[str, Tensor]]) -> Outcome:
    """Round adapters to what a payload holds; where rounding took back what was won, they are fresh again."""

    def store() -> None:
        with torch.no_grad():
            for p in (p for adapter in job.adapters.values() for p in adapter.parameters()):
                p.copy_(torch.from_numpy(as_stored(p.cpu().numpy(), encoding)))

    store()
    loss = judge(job)
    store()  # a core has been in other units meanwhile, which costs the last bits
    decided = job.scorer.decide() if job.scorer.decides else loss
    if outcome.best_step == 0 or (decided, loss) < (outcome.history[0][1], outcome.start_loss):
        return replace(outcome, best_loss=loss)
    for name, adapter in job.adapters.items():
        adapter.load_state_dict(fresh[name])
    store()
    return replace(outcome, best_loss=outcome.start_loss, best_step=0)


def untrained(loss: float) -> Outcome:
    """Return the outcome of a run without a step."""
    return Outcome(loss, loss, 0, 0, 0.0, ((0, loss),), 0.0, (), "steps")


def judge(job: Job, worst: float | None = None) -> float:
    """Return the loss of the network as it is, on `select`; infinite where it scores worse than `worst`."""
    with ready(job, None, NoLog(), Silent()) as training:
        loss = training.judge()
    return math.inf if worst is not None and job.scorer.decide() > worst else loss


@contextlib.contextmanager
def ready(job: Job, saved: Saved | None, log: Log, progress: Progress) -> Iterator[Training]:
    """Set networks up for training, as long as it lasts."""
    opened, settings = job.base.opened, job.settings
    precision = precision_of(settings.precision, job.world.device)
    assert settings.temperature is not None
    objective = Objective(settings.loss, settings.temperature, job.hidden, {})
    with contextlib.ExitStack() as stack:
        stack.enter_context(trained.only(job.module, job.trained))
        stack.enter_context(trained.cores_in_metric(job.module, job.adapters))
        started = Clock()
        what = job.trained
        if factors := job.asked.train == "factors":
            what = trained.whitened(what, first_batches(job), answering(opened, job.module))
        stack.enter_context(rebuilt_kernels(job.module))
        if settings.checkpointing:
            stack.enter_context(checkpointed(job.module))
        student = stack.enter_context(asking(answering(opened, job.module), job.module, job.hidden, precision))
        teacher = None
        if objective.needs_teacher:
            assert job.teacher is not None and job.teacher.module is not None
            original = job.teacher.module
            stack.enter_context(_frozen(original))
            teacher = stack.enter_context(asking(answering(job.teacher, original), original, job.hidden, precision))
        yield Training(
            what, Networks(student, teacher, job.lockstep), objective, job.train_data, job.select_data, settings, job.world,
            job.scorer if job.scorer.decides else None, saved, progress, log, job.finish if factors else None, started,
            _FORESEEN if factors else 0, None if factors else partial(turn, module=job.module, adapters=job.adapters),
        )  # fmt: skip


def first_batches(job: Job) -> list[dict[str, Tensor]]:
    """Return the inputs of the first samples to train on, which tell what factors multiply: every process the same."""
    data, width = job.train_data, width_of(job.train_data)
    units = Order.of(data, job.settings.batch_size, job.settings.seed).epoch(0)
    first = np.concatenate(units)[: _LISTENED // width]
    return [
        laid_out(tensors_of(read_units(data, part).inputs, job.world.device))
        for part in np.array_split(first, -(-len(first) * width // 64))
    ]  # fmt: skip


@contextlib.contextmanager
def _frozen(module: nn.Module) -> Iterator[None]:
    """Let no gradient be wanted of a module's parameters."""
    before = {p: p.requires_grad for p in module.parameters()}
    for p in before:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p, wanted in before.items():
            p.requires_grad_(wanted)


def precision_of(name: str, device: str) -> torch.dtype | None:
    """Return what to cast to: bfloat16 if asked for, or where the device is fast with it; None for float32."""
    fast = device.startswith("cuda") and torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if name == "bf16" or (name == "auto" and fast) else None


def attached(module: nn.Module, asked: Asked, seed: int) -> dict[str, BaseAdapter]:
    """Attach a fresh adapter to every layer that can carry one; no layer gets a rank above its own."""
    generator = torch.Generator().manual_seed(seed)

    def make(layer: str, _: tuple[int, ...]) -> BaseAdapter:
        r, a = by_pattern(layer, asked.ranks, asked.rank), by_pattern(layer, asked.alphas, asked.alpha)
        return fresh(asked.kind, wrap_dense(module, layer).target, r, a, generator=generator, rslora=asked.rslora)

    able = adaptable_layers(module, cores=adapter_class(asked.kind).in_core)
    layers = [n for n in able if takes(asked.kind, layer_target(module, n))]
    if not layers:
        forms = {(m.form, m.layer_kind) for _, m in factorized_layers(module)}
        why = "; ".join(f"{f}: {why_none(f, k)}" for f, k in sorted(forms)) or "no layer is factorized"
        where, expected = "lrcompress recover --adapter", "a kind that these layers take"
        raise CommandError(where, expected, f"{asked.kind} ({why})", "factorize them with svd")
    for pattern in asked.include:
        if not any(fnmatchcase(n, pattern) for n in layers):
            near = ", ".join(layers[:4])
            where, expected = "lrcompress recover --include", "a pattern that matches a layer"
            raise CommandError(where, expected, pattern, f"layers are {near}, …")
    if asked.include:
        layers = [n for n in layers if any(fnmatchcase(n, p) for p in asked.include)]
    for pattern in (*asked.ranks, *asked.alphas):
        if not any(fnmatchcase(n, pattern) for n in layers):
            where, near = "lrcompress recover --rank-pattern, --alpha-pattern", ", ".join(layers[:4])
            raise CommandError(where, "a pattern that matches a layer", pattern, f"layers are {near}, …")
    return attach(module, asked.name, make, layers)


# networks and scores ----------------------------------------------------------------------------------------------


def answer_name(outputs: Mapping[str, Tensor]) -> str:
    return next((n for n in metrics.TELLING if n in outputs), next(iter(outputs)))


def answering(opened: OpenedModel, module: nn.Module) -> Any:
    """Return a function from inputs to the one output that stands for the answer."""

    def answer(inputs: Mapping[str, Tensor]) -> Tensor:
        outputs = opened.outputs(module, inputs)
        return outputs[answer_name(outputs)]

    return answer


def _first_answer(opened: OpenedModel, module: nn.Module, data: Data, device: str) -> tuple[str, Tensor]:
    """Return what a network answers to a few samples, and the name of it."""
    batch = next(iter(data.batches(min(8, len(data)))))
    with torch.no_grad():
        outputs = opened.outputs(module, tensors_of(batch.inputs, device))
    name = answer_name(outputs)
    return name, outputs[name].cpu()
