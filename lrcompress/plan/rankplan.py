"""A plan as a value and as a file: what every layer becomes, what that should lose, and what was rejected and why.

    plan = RankPlan.of(menus, allocation, budget, model_digest)
    write_plan(path, plan)                                    # sorted keys, one value a line: it can be diffed and edited
    choices = read_plan(path, layers, model_digest)           # checked: layers, forms, ranks, the model

`plan.json` is for people too: whoever edits a form or a rank gets what they wrote, or one line that says why not.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import CommandError, PlanError
from ..factorize import Rank, form, forms
from ..files import disk_errors, write_json
from ..model.surgery import Layer
from .allocation import Allocation
from .bits import BITS, BLOCKS
from .options import Menu, Option, bytes_of, serves
from .selection import Budget, Choice, dense

SCHEMA = 1
MAKER = "lrcompress plan"


@dataclass(frozen=True)
class Rejected:
    """An alternative of one layer, and why it was not taken."""

    form: str
    rank: Rank
    bits: int
    why: str


@dataclass(frozen=True)
class Planned:
    """What one layer becomes. Losses are per sample, of the answers; `measured_loss` with this layer alone changed.

    `ms`: the measured time on a device, None where there is none; `block`: inputs that share a scale, at 4 bits.
    """

    choice: Choice
    bits: int
    n_bytes: int
    predicted_loss: float
    measured_loss: float | None = None
    ms: float | None = None
    rejected: tuple[Rejected, ...] = ()
    block: int = 0


@dataclass(frozen=True)
class RankPlan:
    """The plan of one model under one budget.

    `predicted_loss` is the sum over layers, `measured_loss` that of the whole planned network before anything makes up
    for drift, `bound` what no allocation of these options can be below; None where it was not asked for. `about`: what
    else belongs into the file.
    """

    model_digest: str
    budget: Mapping[str, float]
    layers: tuple[Planned, ...]
    method: str = "auto"
    predicted_loss: float | None = None
    measured_loss: float | None = None
    bound: float | None = None
    about: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        menus: Sequence[Menu],
        choices: Sequence[Choice],
        allocation: Allocation,
        budget: Budget,
        *,
        model_digest: str,
        method: str,
        measured: Mapping[str, float] | None = None,
        measured_loss: float | None = None,
    ) -> RankPlan:
        """Return the plan that an allocation is. `measured`: the loss of single layers where it was measured."""
        rows = []
        for m, choice, option in zip(menus, choices, allocation.chosen, strict=True):
            bits = m.layer.weight.element_size() * 8
            alone = (measured or {}).get(m.layer.name)
            rejected = tuple(_rejected(m, option, allocation.price, budget.unit, bits))
            n_bytes = bytes_of(choice.form, m.layer, choice.n_params)
            rows.append(Planned(choice, bits, n_bytes, option.loss, alone, rejected=rejected))
        return cls(
            model_digest, {budget.unit: budget.limit}, tuple(rows), method, allocation.loss, measured_loss, allocation.bound
        )  # fmt: skip

    @property
    def choices(self) -> list[Choice]:
        return [p.choice for p in self.layers]

    def as_json(self) -> dict[str, Any]:
        """Return the plan as plain values, in the form of the file."""
        return {
            "schema": SCHEMA,
            "made_by": MAKER,
            "model_digest": self.model_digest,
            "budget": dict(self.budget),
            "method": self.method,
            "predicted_loss": _rounded(self.predicted_loss),
            "measured_loss": _rounded(self.measured_loss),
            "bound": _rounded(self.bound),
            **self.about,
            "layers": [_layer_json(p) for p in self.layers],
        }


def _layer_json(p: Planned) -> dict[str, Any]:
    found: dict[str, Any] = {
        "name": p.choice.name,
        "form": p.choice.form,
        "rank": _plain(p.choice.rank),
        "bits": p.bits,
        "params": p.choice.n_params,
        "bytes": p.n_bytes,
        "ms": p.ms,
        "predicted_loss": _rounded(p.predicted_loss),
        "measured_loss": _rounded(p.measured_loss),
        "rejected": [{"form": r.form, "rank": _plain(r.rank), "bits": r.bits, "why": r.why} for r in p.rejected],
    }
    extra = {"reason": p.choice.reason, "block": p.block}
    return found | {k: v for k, v in extra.items() if v}


def _plain(rank: Rank) -> Any:
    return list(rank) if isinstance(rank, tuple) else rank


def _rounded(value: float | None) -> float | None:
    """Return six digits: what is beyond them is noise, and would make every diff a long one."""
    return None if value is None else float(f"{value:.6g}")


def _rejected(m: Menu, taken: Option, price: float, unit: str, bits: int) -> list[Rejected]:
    """Return the best alternative of every other form, and dense, each with why it was not taken."""
    out = []
    for name, own in sorted(m.forms.items()):
        if name == taken.form:
            continue
        best = min(own, key=lambda o: (o.loss + price * o.cost(unit), o.cost(unit)))
        out.append(Rejected(name, best.rank, bits, _why(best, taken, unit)))
    out += [Rejected(n, 0, bits, "more multiply-adds than the dense layer wherever it is smaller") for n in m.slow]
    if taken.form != "dense" and m.layer.reason is None:
        extra = m.dense.cost(unit) - taken.cost(unit)
        saved = f"{extra:,} {unit} more would save a loss of {taken.loss:.3g}"
        worth = f"; elsewhere they save {price * extra:.3g}" if price > 0 else ""
        out.append(Rejected("dense", 0, bits, saved + worth))
    return out


def _why(best: Option, taken: Option, unit: str) -> str:
    """Compare the best of another form with what was taken."""
    cost, loss = best.cost(unit) - taken.cost(unit), best.loss - taken.loss
    if cost >= 0 and loss >= 0:
        ratio = f", {best.loss / taken.loss:.2f} times the loss" if taken.loss > 0 and loss > 0 else ""
        return f"{cost:,} {unit} more{ratio}" if cost else f"as many {unit}{ratio or ', no gain'}"
    if cost < 0:
        return f"{-cost:,} {unit} fewer, but a loss of {best.loss:.3g} instead of {taken.loss:.3g}"
    return f"a loss of {best.loss:.3g} instead of {taken.loss:.3g}, but {cost:,} {unit} more, worth more elsewhere"


def write_plan(path: Path, plan: RankPlan) -> None:
    """Write a plan file; one that is there must be a plan. Raises `CommandError`, `HostError`."""
    check_plan(path)
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, plan.as_json())


def check_plan(path: Path) -> None:
    """Raise `CommandError` where a plan may not be written: over another file, or below one."""
    if path.exists() and not _is_ours(path):
        raise CommandError(path, "a new file, or a plan to replace", "something else", "name another file with -o")
    nearest = next(p for p in path.absolute().parents if p.exists())
    if not nearest.is_dir():
        raise CommandError(path, "a place below folders", f"{nearest.name} is a file", "choose another place with -o")


def _is_ours(path: Path) -> bool:
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(value, dict) and value.get("made_by") == MAKER


def read_plan(path: Path, layers: Sequence[Layer], model_digest: str | None = None) -> list[Choice]:
    """Return the choices of a plan file; layers that it does not name stay dense.

    Raises `PlanError` for a file that is no plan, a plan of another model (where both say which), an unknown layer or
    form, a rank its layer does not have, or bits that no export writes.
    """
    value = _object(path)
    if value.get("schema") != SCHEMA:
        raise PlanError(path, f"schema {SCHEMA}", value.get("schema"))
    digest = value.get("model_digest")
    if digest is not None and model_digest is not None and digest != model_digest:
        got = f"one for {str(digest)[:12]}"
        remedy = "plan this model; or, to use the ranks all the same, remove model_digest from the file"
        raise PlanError(path, f"a plan for this model ({model_digest[:12]})", got, remedy)
    known = {layer.name: layer for layer in layers}
    planned: dict[str, Choice] = {}
    for i, entry in enumerate(value["layers"]):
        choice = _planned(f"{path}: layers[{i}]", entry, known)
        if choice.name in planned:
            raise PlanError(f"{path}: layers[{i}]", "each layer once", choice.name)
        planned[choice.name] = choice
    return [planned.get(layer.name, dense(layer, layer.reason or "not in the plan")) for layer in layers]


def read_bits(path: Path) -> dict[str, int] | None:
    """Return the bits of a plan's layers that it gives other than 32: what an export makes of them; None where it gives none.

    Raises `PlanError` for a file that is no plan, or bits that no export writes.
    """
    found = {}
    for i, entry in enumerate(_object(path)["layers"]):
        bits = entry.get("bits") if isinstance(entry, dict) else None
        if bits is not None:
            found[str(entry.get("name"))] = _checked_bits(f"{path}: layers[{i}] ({entry.get('name')})", bits)
    return {name: bits for name, bits in found.items() if bits < 32} if found else None


def read_blocks(path: Path) -> dict[str, int]:
    """Return how many inputs share a scale in the layers of a plan that say so. Raises `PlanError` for other widths."""
    found = {}
    for i, entry in enumerate(_object(path)["layers"]):
        block = entry.get("block") if isinstance(entry, dict) else None
        if block is not None:
            found[str(entry.get("name"))] = _checked_block(f"{path}: layers[{i}] ({entry.get('name')})", block)
    return found


def _checked_bits(where: str, bits: Any) -> int:
    if type(bits) is not int or bits not in (64, *BITS):  # a double stays what it is
        raise PlanError(where, f"bits {', '.join(map(str, BITS))}", bits, "write one of them, or leave bits out")
    return bits


def _checked_block(where: str, block: Any) -> int:
    if type(block) is not int or block not in BLOCKS:
        raise PlanError(where, f"block {', '.join(map(str, BLOCKS))}", block, "write one of them, or leave block out")
    return block


def _object(path: Path) -> dict[str, Any]:
    try:
        value: Any = json.loads(path.read_text())
    except OSError as e:
        raise PlanError(path, "a readable plan file", e.strerror or str(e)) from e
    except (ValueError, RecursionError) as e:
        raise PlanError(path, "JSON", str(e), "write one with 'lrcompress plan'") from e
    if not isinstance(value, dict) or not isinstance(value.get("layers"), list):
        raise PlanError(path, "an object with a list 'layers'", type(value).__name__)
    return value


def _planned(where: str, entry: Any, known: Mapping[str, Layer]) -> Choice:
    if not isinstance(entry, dict) or not {"name", "form"} <= set(entry):
        raise PlanError(where, "an object with name, form and rank", entry)
    layer = known.get(str(entry["name"]))
    if layer is None:
        raise PlanError(
            where,
            f"a layer of this model ({', '.join(list(known)[:4])}, …)",
            entry["name"],
            "a plan belongs to one model",
        )
    where = f"{where} ({layer.name})"
    if entry.get("bits") is not None:
        _checked_bits(where, entry["bits"])
    if entry.get("block") is not None:
        _checked_block(where, entry["block"])
    if entry["form"] == "dense":
        return dense(layer, layer.reason or str(entry.get("reason") or "the plan keeps it dense"))
    if layer.reason is not None:
        raise PlanError(where, "form dense", entry["form"], layer.reason)
    if entry["form"] not in forms() or not serves(entry["form"], layer):
        fitting = [n for n in forms() if serves(n, layer)]
        raise PlanError(where, f"a form for a {layer.kind} layer: {', '.join(fitting)}", entry["form"])
    rank = _rank(where, entry, layer)
    return Choice(layer.name, entry["form"], rank, form(entry["form"]).n_params(layer.shape, rank))


def _rank(where: str, entry: Mapping[str, Any], layer: Layer) -> Rank:
    top = form(entry["form"]).full_rank(layer.shape)
    rank: Any = tuple(entry["rank"]) if isinstance(entry.get("rank"), list) else entry.get("rank")
    flat = (rank,) if isinstance(top, int) else rank
    tops = (top,) if isinstance(top, int) else top
    valid = isinstance(flat, tuple) and len(flat) == len(tops)
    if not valid or not all(type(r) is int and 1 <= r <= t for r, t in zip(flat, tops, strict=True)):
        wanted = f"a rank in 1…{top}" if isinstance(top, int) else f"ranks in 1…{list(top)}"
        raise PlanError(where, wanted, entry.get("rank"), f"the weight is {list(layer.shape)}")
    return rank  # type: ignore[no-any-return]
