"""Exporters: one file per target, whose key is its file name.

A target is a module of this package (or of the entry-point group `lrcompress.export.targets`) with

    QUANTIZE: tuple[str, ...]                       the precisions it writes, "none" among them
    write(stage, request: Request) -> Written       put `model.onnx` and `base.data` into the folder `stage`

What runs on a device reads those two; a target decides how they come about. Goldens, limits, manifest and payloads
are the same for all targets and are written around it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import numpy as np
from torch import nn

from ... import plugins
from ...errors import CommandError
from ...model import OpenedModel
from ...plan.profile import DeviceProfile


@dataclass(frozen=True)
class Request:
    """What to export. `module` is the live network; `calibration`: feeds to quantize by, None without data.

    `bits`: of single layers, for `quantize` "plan"; `profile`: the device that must be able to run it.
    `block`: inputs that share a scale at 4 bits; `blocks`: where a layer has its own.
    """

    opened: OpenedModel
    module: nn.Module
    slots: Sequence[str] | None
    slot_include: Sequence[str]
    quantize: str
    calibration: Sequence[dict[str, np.ndarray]] | None
    golden: Mapping[str, np.ndarray]
    advance: Callable[[float, str], None]
    bits: Mapping[str, int] = field(default_factory=dict)
    profile: DeviceProfile | None = None
    block: int = 32
    blocks: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Written:
    """What a target wrote: the slots it wired, the outputs, and what the manifest says of the graph.

    `weights`: what became of each quantized one; `ort_min`: the oldest runtime that will do.
    """

    slots: list[dict[str, Any]]
    outputs: list[dict[str, Any]]
    factors: list[str]
    about: dict[str, Any] = field(default_factory=dict)
    weights: list[dict[str, Any]] = field(default_factory=list)
    ort_min: str = "1.22.0"


def target(name: str) -> ModuleType:
    """Return the module of a target. Raises `CommandError` with those that exist."""
    try:
        return plugins.load(__name__, name)
    except KeyError:
        raise CommandError("lrcompress export --target", " or ".join(targets()), name) from None


def targets() -> tuple[str, ...]:
    """Return the keys of all targets."""
    return plugins.names(__name__)


__all__ = ["Request", "Written", "target", "targets"]
