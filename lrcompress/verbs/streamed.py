"""Factorize a bare state dict tensor by tensor: no more is in memory than the largest layer and what comes of it.

Choosing by rank or plan needs shapes only; by energy or budget, the curves, which are small. Each result is kept in a
store beside the output as it is done, and the output is put together from the source and the store.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .._version import __version__
from ..errors import HostError
from ..factorize import Factorization, Point, Statistics
from ..files import sha256_file
from ..model import OpenedModel
from ..model.checkpoint import layer_spec
from ..model.stored import Piece, Reference, StoredFile, StoredTensors, held
from ..model.surgery import Layer, tensors_as_layers
from ..model.ties import place, tied_tensors
from ..plan import Choice
from ..plan.options import candidates
from ..progress import Progress
from ..work import Curve, CurveJob, Job, Pool, Store, run
from .asking import marked
from .stacked import same_input
from .tied import Ties, choose, planned


@dataclass(frozen=True)
class Asked:
    """What decides the result beside the model: the options of `factorize`, by their names."""

    rank: int | None
    ratio: float | None
    energy: float | None
    plan: Path | None
    method: str
    include: tuple[str, ...]
    exclude: tuple[str, ...]
    svd: str

    def command(self, opened: OpenedModel) -> list[Any]:
        """Return plain values that name this command and no other."""
        own = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "plan"}
        plan = None if self.plan is None else sha256_file(self.plan)
        return ["factorize", opened.digest, own, plan, torch.get_num_threads(), __version__, torch.__version__]


@dataclass(frozen=True)
class PricedLayer(Layer):
    """A layer without its numbers (its weight is on the meta device) whose curves are known."""

    curves: Mapping[str, Curve] = field(default_factory=dict, repr=False)

    def curve(self, form_name: str, statistics: Statistics | None = None) -> list[Point]:
        return self.curves[form_name].points

    def energy(self, statistics: Statistics | None = None) -> float:
        return next(iter(self.curves.values())).total if self.curves else 0.0


@dataclass
class Streamed:
    """What became of a state dict: its tensors (None where nothing is to be written), layer specs, rows of the report."""

    tensors: StoredTensors | None
    specs: dict[str, Any]
    rows: list[dict[str, Any]]
    n_params: int


def factorize_stored(
    opened: OpenedModel, asked: Asked, *, pool: Pool, output: Path | None, progress: Progress
) -> contextlib.AbstractContextManager[Streamed]:
    """Decompose what `asked` says; while the context lasts, the tensors of the result can be read.

    With an `output`, results are kept beside it, and removed when the context ends without an error.
    """
    tensors = held(opened.tensors or {})
    about = tensors.described()
    layers = marked(
        tensors_as_layers(about), asked.include, asked.exclude, verb="factorize", where=opened.path or "the model"
    )
    ties = tied_tensors(layers)
    if asked.method == "shared":
        same_input(layers, {})  # it takes data, which take a network
    total = count(about)
    work = _Work(tensors, layers, ties, asked, pool, progress, torch.get_num_threads(), opened.digest)
    return _streamed(work, opened, total, output)


@contextlib.contextmanager
def _streamed(work: _Work, opened: OpenedModel, total: int, output: Path | None) -> Iterator[Streamed]:
    # By rank or plan the choice needs no numbers: what is wrong with it is said before anything is written.
    choices = None if work.needs_curves else work.choose(total)
    if choices is not None and output is not None:
        work.check_space(choices, output)
    with kept(output, work.asked.command(opened)) as store:
        if choices is None:
            choices = work.choose(total, store)
            if output is not None:
                work.check_space(choices, output, store)
        yield work.decompose(choices, store)
        if store is not None:
            store.remove()


def kept(output: Path | None, command: list[Any]) -> contextlib.AbstractContextManager[Store | None]:
    """Open the store of a command beside its output; None where nothing is written."""
    return contextlib.nullcontext() if output is None else Store.open(output, command)


def svd_options(form_name: str, algorithm: str) -> dict[str, Any]:
    """Return the arguments of a form that takes the algorithm of its SVD."""
    return {"algorithm": algorithm} if form_name == "svd" and algorithm != "auto" else {}


@dataclass(frozen=True)
class _Work:
    tensors: StoredTensors
    layers: Sequence[Layer]
    ties: Ties
    asked: Asked
    pool: Pool
    progress: Progress
    threads: int
    digest: str

    @property
    def needs_curves(self) -> bool:
        return self.asked.energy is not None or self.asked.ratio is not None

    @property
    def followers(self) -> dict[str, str]:
        return {f: leader for leader, followers in self.ties.items() for f in followers}

    def choose(self, total: int, store: Store | None = None) -> list[Choice]:
        """Return one choice per layer of a model of `total` numbers."""
        asked = self.asked
        if asked.plan is not None:
            return planned(asked.plan, self.layers, self.ties, self.digest)
        layers = self.priced(store) if self.needs_curves else self.layers
        how = {"method": asked.method, "rank": asked.rank, "ratio": asked.ratio, "energy": asked.energy}
        return choose(layers, self.ties, total=total, statistics={}, **how)

    def priced(self, store: Store | None) -> list[PricedLayer]:
        """Return the layers with the curves of the forms they may take."""
        wanted = [
            (layer, name)
            for layer in self.layers
            if layer.reason is None and layer.name not in self.followers
            for name in candidates(self.asked.method, layer)
        ]
        jobs = [CurveJob(self.weight(layer), name) for layer, name in wanted]
        curves: dict[str, dict[str, Curve]] = {}
        with self.progress.task("spectra", total=len(jobs)) as advance:
            done = run(jobs, store=store, pool=self.pool, threads=self.threads)
            for (layer, name), (_, curve) in zip(wanted, done, strict=True):
                curves.setdefault(layer.name, {})[name] = curve
                advance(1, layer.name)
        return [
            PricedLayer(n.name, n.kind, n.weight, n.reason, n.has_bias, curves.get(n.name, {})) for n in self.layers
        ]

    def decompose(self, choices: Sequence[Choice], store: Store | None) -> Streamed:
        """Return the tensors with the factors of every chosen layer in the place of its weight."""
        followers = self.followers
        pairs = list(zip(self.layers, choices, strict=True))
        leaders = [(n, c) for n, c in pairs if c.form != "dense" and n.name not in followers]
        jobs = [
            Job(self.weight(n), c.form, rank=c.rank, options=svd_options(c.form, self.asked.svd), name=n.name)
            for n, c in leaders
        ]
        done = run(jobs, store=store, pool=self.pool, threads=self.threads)
        out = _Output(self.tensors)
        found: dict[str, Factorization] = {}
        with self.progress.task("factorize", total=len(jobs)) as advance:
            for (layer, _), (key, made) in zip(leaders, done, strict=True):
                found[layer.name] = out.put(layer, made, None if store is None else store.file(key))
                advance(1, layer.name)
        for layer, choice in pairs:
            leader = followers.get(layer.name)
            own = found.get(leader or layer.name)
            if choice.form == "dense" or own is None:
                out.rows.append(row(layer, choice, None, tied=leader is not None))
                continue
            out.name(layer, own, leader)
            out.rows.append(row(layer, choice, own, tied=leader is not None))
        return out.streamed(kept=store is not None)

    def weight(self, layer: Layer) -> Tensor | Reference:
        """Return a layer's weight for a job: a reference where it lies in a file."""
        key = _key(self.tensors, layer)
        found = self.tensors.reference(key)
        return self.tensors[key] if found is None else found

    def check_space(self, choices: Sequence[Choice], output: Path, store: Store | None = None) -> None:
        """Raise `HostError` unless the disk takes the results and, before they go, the output."""
        kept = sum(t.nbytes for t in self.tensors.described().values())
        factors = 0
        for layer, choice in zip(self.layers, choices, strict=True):
            if choice.form != "dense":
                kept -= layer.weight.nbytes
                factors += choice.n_params * layer.weight.element_size()
        needed = kept + 2 * factors - (0 if store is None else store.n_bytes)
        output = Path(os.path.abspath(output))  # noqa: PTH100
        parent = next(p for p in output.parents if p.is_dir())
        free = shutil.disk_usage(parent).free
        if free < needed:
            got = f"No space left on device: {free:,} bytes are free, {needed:,} are needed"
            raise HostError(output, "a disk that takes the output", got, "free some space")


class _Output:
    """The result as it grows: dense tensors where they are, factors in the store."""

    def __init__(self, source: StoredTensors) -> None:
        self._source = source
        self._about = source.described()
        self._pieces = dict(source.pieces)
        self.specs: dict[str, Any] = {}
        self.rows: list[dict[str, Any]] = []

    def put(self, layer: Layer, found: Factorization, file: StoredFile | None) -> Factorization:
        """Take the factors of a layer; return them without their numbers."""
        prefix = _key(self._source, layer).removesuffix("weight")
        bare = {name: torch.empty_like(factor, device="meta") for name, factor in found.named_factors()}
        for name, factor in bare.items():
            self._about[f"{prefix}{name}"] = factor
            if file is not None:
                self._pieces[f"{prefix}{name}"] = Piece(file, f"factor.{name}")
        return replace(found, factors=bare)

    def name(self, layer: Layer, found: Factorization, leader: str | None) -> None:
        """Take the weight of a layer out; a tied one's spec says whose factors are its own."""
        key = _key(self._source, layer)
        del self._pieces[key], self._about[key]
        shapes = {k: tuple(v.shape) for k, v in found.factors.items()}
        bias = f"{key.removesuffix('weight')}bias" in self._source
        spec = layer_spec(layer.kind, found.form, found.shape, found.rank, shapes, bias=bias)
        self.specs[layer.name] = spec if leader is None else {**spec, "tied": leader}

    def streamed(self, *, kept: bool) -> Streamed:
        tensors = StoredTensors(pieces=self._pieces) if kept else None
        return Streamed(tensors, self.specs, self.rows, count(self._about))


def _key(tensors: Mapping[str, Tensor], layer: Layer) -> str:
    return f"{layer.name}.weight" if f"{layer.name}.weight" in tensors else layer.name


def row(layer: Layer, choice: Choice, found: Factorization | None, *, tied: bool) -> dict[str, Any]:
    """Return the report of one layer; the numbers of a tied weight stand with its first layer."""
    rank: Any = 0 if found is None else found.rank
    return {
        "name": layer.name,
        "form": choice.form,
        "shape": list(layer.plain_shape),
        "rank": list(rank) if isinstance(rank, tuple) else rank,
        "params_before": 0 if tied else layer.weight.numel(),
        "params_after": choice.n_params,
        "rel_error": 0.0 if found is None else found.rel_error,
        "norm": "frobenius" if found is None else found.norm,
        "rel_error_frobenius": 0.0 if found is None else found.rel_error_frobenius,
        "reason": choice.reason,
    }


def count(tensors: Mapping[str, Tensor]) -> int:
    """Return how many numbers named tensors hold, tied ones once."""
    return sum(t.numel() for t in {place(t): t for t in tensors.values()}.values())
