"""Where an exported model is made to answer: one module per kind of target, its name is the key.

    answers = run_on("arm64:cortex-a53", Job(exported, manifest, inputs, {"base": None}), progress)

A target module has `CPU_CLASS`, the key of the manifest's tolerances, and `run(detail, job, progress) -> Answers`,
where `detail` is what stands behind the colon.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ... import plugins
from ...errors import CommandError
from ...manifest import Manifest
from ...payload import Payload
from ...progress import Progress

WHERE = "lrcompress validate --on"


@dataclass(frozen=True)
class Job:
    """What to answer. `cases`: name -> the payload that is active, None for the factory model."""

    exported: Path
    manifest: Manifest
    inputs: Mapping[str, np.ndarray]
    cases: Mapping[str, Payload | None]
    threads: int = 1


@dataclass(frozen=True)
class Answers:
    """Outputs by case and name; the latency of one sample where the target can measure it.

    `cpu_class`: the kind of processor that answered, where only it could tell.
    """

    outputs: Mapping[str, Mapping[str, np.ndarray]]
    p50_ms: float | None = None
    p95_ms: float | None = None
    cpu_class: str | None = None


def check(target: str) -> None:
    """Refuse a target that does not exist, before anything has run."""
    key, _, _ = target.partition(":")
    if key not in plugins.names(__name__):
        raise CommandError(
            WHERE, f"one of {', '.join(plugins.names(__name__))}", target, "for example arm64:cortex-a53"
        )
    plugins.load(__name__, key).check(target.partition(":")[2])


def cpu_class(target: str) -> str:
    """Return the key of the tolerance that holds on `target`."""
    return str(plugins.load(__name__, target.partition(":")[0]).CPU_CLASS)


def run_on(target: str, job: Job, progress: Progress) -> Answers:
    """Answer `job` on `target`. Raises `CommandError` if there is no such target, `HostError` if it cannot be had."""
    check(target)
    key, _, detail = target.partition(":")
    answers: Answers = plugins.load(__name__, key).run(detail, job, progress)
    return answers
