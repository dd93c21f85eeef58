"""What a recipe may say: frozen parts in which every key is known."""

from __future__ import annotations

from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, PrivateAttr, model_validator

from ..adapt import kinds as adapter_kinds
from ..errors import CommandError
from ..model import InputSpec
from ..recover.closed_adapters import KINDS as CLOSED_KINDS
from ..recover.losses import parse as parse_loss
from ..yamlfile import Part


class InputPart(Part):
    """One input of the network; a word in `shape` is a free axis."""

    dtype: str = "float32"
    shape: tuple[int | str, ...]


class ModelPart(Part):
    """Where the network comes from: a pretrained `source`, or `train`, which makes one when the recipe runs."""

    source: str | None = None
    train: str | None = None
    train_args: dict[str, Any] = {}
    arch: str | None = None
    arch_args: dict[str, Any] = {}
    inputs: dict[str, InputPart] = {}
    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]*$")] | None = None
    trust_pickle: bool = False

    @model_validator(mode="after")
    def _one_origin(self) -> ModelPart:
        if (self.source is None) == (self.train is None):
            raise ValueError("exactly one of source and train")
        if self.train is not None and (self.arch is None or not self.inputs):
            raise ValueError("arch and inputs for a network that is trained here")
        return self


class PreprocessPart(Part):
    """How one input's stored samples become numbers for the network."""

    layout: Literal["nhwc_to_nchw", "nchw_to_nhwc"] | None = None
    scale: float = 1.0
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    resize: int | None = None


class ColumnsPart(Part):
    """Which columns of a table are what."""

    text: str | None = None
    pair: str | None = None
    label: str | None = None


class SplitPart(Part):
    """One set of samples: after `skip` rows every `every`-th one, at most `limit`; files are often sorted by kind."""

    source: str
    args: dict[str, Any] = {}
    skip: Annotated[int, Field(ge=0)] = 0
    every: Annotated[int, Field(ge=1)] = 1
    limit: Annotated[int, Field(ge=1)] | None = None


class DataPart(Part):
    """The sets of samples; `select` decides when to stop and `test` is opened by evaluation only."""

    preprocess: dict[str, PreprocessPart] = {}
    columns: ColumnsPart | None = None
    tokenizer: str | None = None
    max_length: Annotated[int, Field(ge=1)] = 128
    calibration: SplitPart
    train: SplitPart
    select: SplitPart
    test: SplitPart


class MetricPart(Part):
    """What counts, and how much of it may be lost against the original."""

    name: str = "accuracy"
    max_drop: Annotated[float, Field(ge=0)] = 0.01


class FactorizePart(Part):
    """How small; exactly one of rank, ratio, energy, plan."""

    method: str = "auto"
    rank: Annotated[int, Field(ge=1)] | None = None
    ratio: Annotated[float, Field(gt=0, le=1)] | None = None
    energy: Annotated[float, Field(gt=0, le=1)] | None = None
    plan: str | None = None
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _one_size(self) -> FactorizePart:
        if sum(v is not None for v in (self.rank, self.ratio, self.energy, self.plan)) != 1:
            raise ValueError("exactly one of rank, ratio, energy, plan")
        return self


class TrainingPart(Part):
    """How a correction is trained. `max_seconds` makes the result depend on the machine's speed; `steps` does not.

    `teacher`: the loss, a name or a weighted sum such as "logits=1,labels=0.5"; `auto` is what fits the answers.
    """

    rank: Annotated[int, Field(ge=1)] = 8
    teacher: str = "auto"
    steps: Annotated[int, Field(ge=1)] | None = None
    batch_size: Annotated[int, Field(ge=1)] = 64
    accumulate: Annotated[int, Field(ge=1)] = 1
    learning_rate: Annotated[float, Field(gt=0)] | Literal["auto"] = "auto"
    patience: Annotated[int, Field(ge=0)] = 0
    max_seconds: Annotated[float, Field(gt=0)] | None = None
    temperature: Annotated[float, Field(gt=0)] | None = None
    hidden: tuple[str, ...] = ()
    augment: bool = False
    mix: bool | None = None
    checkpointing: bool = False
    precision: Literal["auto", "fp32", "bf16"] = "auto"

    @model_validator(mode="after")
    def _known_losses(self) -> TrainingPart:
        try:
            mix = parse_loss(self.teacher)
        except CommandError as e:
            raise ValueError(f"teacher: {e.expected}, not {e.got}; {e.remedy}") from e
        if self.hidden and "hidden" not in mix:
            raise ValueError("the loss hidden in teacher, where hidden names modules")
        return self


def _switch(value: Any) -> Any:
    """Return the word that YAML took for a truth value: `off` without quotes."""
    return "off" if value is False else value


class RecoverPart(TrainingPart):
    """The first correction: the kinds are tried in turn and the best on `select` is shipped.

    `train`: adapters on the factors as they are; the factors themselves, without a correction; or both: the factors
    first, then adapters on what came of them. `closed`: adapters start from closed forms (auto), are nothing else (only),
    or start from zero (off); with refit the base is changed by least squares instead of training its factors, and a
    correction on top of it takes `train: both`.
    """

    train: Literal["adapters", "factors", "both"] = "adapters"
    closed: Annotated[Literal["auto", "only", "off", "refit"], BeforeValidator(_switch)] = "auto"
    kinds: Annotated[tuple[str, ...], Field(min_length=1)] = ("lora",)

    @property
    def rebases(self) -> bool:
        """Whether the factorized network itself is changed."""
        return self.train != "adapters" or self.closed == "refit"

    @property
    def corrects(self) -> bool:
        """Whether a correction is made that can travel by itself."""
        return self.train == "both" or not self.rebases

    @model_validator(mode="after")
    def _closed_fits(self) -> RecoverPart:
        for kind in self.kinds:
            _check_kind(kind, self.closed)
        if self.closed == "only" and self.train == "factors":
            raise ValueError("closed: only with adapters, which have closed forms; factors take closed: refit")
        return self


def _check_kind(kind: str, closed: str) -> None:
    """Refuse a kind of adapter that nobody knows, or that `closed: only` has no formula for."""
    if kind not in adapter_kinds():
        near = get_close_matches(kind, adapter_kinds(), 1)
        hint = f", did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"kinds of adapters among {', '.join(adapter_kinds())}, not {kind!r}{hint}")
    if closed == "only" and kind not in CLOSED_KINDS:
        raise ValueError(f"closed: only with {' or '.join(CLOSED_KINDS)}; {kind!r} has no closed form, train it")


class ShiftPart(Part):
    """The samples of a changed world."""

    train: SplitPart
    select: SplitPart
    test: SplitPart


class UpdatePart(TrainingPart):
    """A later correction: what changed, and how it is learnt."""

    name: Annotated[str, Field(pattern=r"^[a-z][a-z0-9_-]*$")]
    about: str = ""
    closed: Annotated[Literal["auto", "only", "off"], BeforeValidator(_switch)] = "auto"
    kind: str = "lora"
    data: ShiftPart

    @model_validator(mode="after")
    def _known_kind(self) -> UpdatePart:
        _check_kind(self.kind, self.closed)
        return self


class ExportPart(Part):
    """What the device is given."""

    slots: tuple[str, ...] | None = None  # lora, and core where layers are factorized
    slot_include: tuple[str, ...] = ()
    quantize: Literal["none", "fp16", "int8", "int4", "plan"] = "none"


class ValidatePart(Part):
    """Where the export must agree with the network."""

    on: tuple[str, ...] = ("cpu",)


class PublishPart(Part):
    """How corrections travel."""

    group: str = "default"
    encoding: Literal["auto", "f32", "f16", "int8", "int4"] = "auto"
    fleet: Annotated[int, Field(ge=1)] = 1000


class Recipe(Part):
    """A whole recipe. `path` is the file it was read from."""

    schema_: Literal[1] = Field(alias="schema")
    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]*$")]
    about: str = ""
    seed: int = 0
    threads: Annotated[int, Field(ge=1)] = 1
    model: ModelPart
    data: DataPart
    metric: MetricPart = MetricPart()
    factorize: FactorizePart
    recover: RecoverPart = RecoverPart()
    export: ExportPart = ExportPart()
    validate_: ValidatePart = Field(default=ValidatePart(), alias="validate")
    publish: PublishPart = PublishPart()
    updates: tuple[UpdatePart, ...] = ()
    _path: Path = PrivateAttr(default=Path("recipe.yaml"))

    @property
    def path(self) -> Path:
        return self._path

    @property
    def inputs(self) -> tuple[InputSpec, ...]:
        """The network's inputs as far as the recipe says them."""
        return tuple(InputSpec(name, p.dtype, p.shape) for name, p in self.model.inputs.items())

    def as_dict(self) -> dict[str, Any]:
        return self.model_dump(mode="json", by_alias=True)
