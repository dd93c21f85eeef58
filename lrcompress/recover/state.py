"""The state of a run in training, whole: what the next step needs, and nothing that it can compute again.

It is kept under the hash of everything that decides the run. Two files take turns, so that one that a power cut spoils
leaves the other; what does not have the hash it was written with is passed over, and said.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..work import Store
from ..work.jobs import Packed
from .keeping import Seen
from .whitening import Whitened

_SLOTS = ("even", "odd")


@dataclass
class State:
    """Where a run is. `position` in an epoch counts batches; `rate` is None until one was found; `begun`: how often the
    run began again, at a lower one.
    """

    begun: int = 0
    step: int = 0
    epoch: int = 0
    position: int = 0
    seconds: float = 0.0
    rate: float | None = None
    rates: list[tuple[float, float]] = field(default_factory=list)
    start: float = 0.0
    #: The state that is kept. The losses there are the same numbers where no score decides.
    best: float = 0.0
    start_loss: float = 0.0
    best_loss: float = 0.0
    best_step: int = 0
    #: The best that was seen: what is kept may be a later state that cannot be told from it.
    top: float = 0.0
    top_loss: float = 0.0
    since_best: int = 0
    evaluations: int = 0
    done_evaluations: int = 0
    reserve_seconds: float = 0.0
    teacher_kept: bool = True
    history: list[tuple[int, float]] = field(default_factory=list)
    kept: dict[str, Tensor] = field(default_factory=dict)
    seen: Seen = field(default_factory=dict)

    def pack(self, parameters: Mapping[str, nn.Parameter], optimizer: Whitened) -> Packed:
        """Return everything as named tensors and plain values; numbers keep all their bits."""
        tensors = {f"kept.{n}": t.cpu() for n, t in self.kept.items()}
        tensors |= {f"seen.{n}": t.cpu() for n, t in self.seen.items()}
        tensors["random"] = torch.get_rng_state()
        for name, p in parameters.items():
            tensors[f"now.{name}"] = p.detach().cpu().clone()
            for key, value in optimizer.state_of(name).items():
                tensors[f"optimizer.{key}.{name}"] = torch.as_tensor(value).detach().cpu().clone()
        about = {k: v for k, v in self.__dict__.items() if k not in ("kept", "seen")}
        return Packed({n: t.contiguous() for n, t in tensors.items()}, _hexed(about))

    @classmethod
    def unpack(
        cls, packed: Packed, parameters: Mapping[str, nn.Parameter], optimizer: Whitened
    ) -> State:  # fmt: skip
        """Return a state and put parameters and optimizer back to where they were."""
        tensors, about = packed
        state = cls(**_plain(about))
        state.kept = {n: tensors[f"kept.{n}"].to(p.device) for n, p in parameters.items()}
        state.seen = {k.removeprefix("seen."): t for k, t in tensors.items() if k.startswith("seen.")}
        torch.set_rng_state(tensors["random"])
        with torch.no_grad():
            for name, p in parameters.items():
                p.copy_(tensors[f"now.{name}"])
                own = {
                    k.split(".")[1]: t
                    for k, t in tensors.items()
                    if k.startswith("optimizer.") and k.split(".", 2)[2] == name
                }
                if own:
                    optimizer.put_state(name, {k: t.to(p.device) for k, t in own.items()})
        return state


def _hexed(value: Any) -> Any:
    if isinstance(value, float):
        return {"hex": value.hex()}
    if isinstance(value, dict):
        return {k: _hexed(v) for k, v in value.items()}
    return [_hexed(v) for v in value] if isinstance(value, list | tuple) else value


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return float.fromhex(value["hex"]) if set(value) == {"hex"} else {k: _plain(v) for k, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, list) else value


class Saved:
    """The states of one run in a store, under the key of what decides it."""

    def __init__(self, store: Store, key: str) -> None:
        self._store, self._key, self._turn = store, key, 0

    def load(self) -> Packed | None:
        """Return the later of the two states that are whole, or None."""
        found = [(p, i) for i, slot in enumerate(_SLOTS) if (p := self._store.get(f"{self._key}-{slot}")) is not None]
        if not found:
            return None
        packed, turn = max(found, key=lambda f: (int(f[0].about.get("begun", 0)), int(f[0].about["step"])))
        self._turn = 1 - turn
        return packed

    def save(self, packed: Packed) -> None:
        self._store.put(f"{self._key}-{_SLOTS[self._turn]}", packed)
        self._turn = 1 - self._turn
