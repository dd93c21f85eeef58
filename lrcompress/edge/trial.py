"""The verdict on one payload: does it fit this base, and does it answer what its publisher saw it answer?

It is reached in a process of its own, so that a payload which crashes the runtime, eats the memory or never answers
takes nobody with it. A check that failed is final; a process that ended without saying so has given no verdict.

    trial = ChildTrial(folder / "factory", limits)
    trial(data)                     # returns, or raises PayloadError (final) or NoVerdict (again, later)

A payload that comes with a base of its own is tried on that, once the base has answered its own golden inputs as its
publisher saw it answer them, and in reasonable time.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import onnxruntime as ort

from ..errors import DataError, ManifestError, PayloadError
from ..golden import GoldenSet, ParityReport, compare, compare_projected, load_golden
from ..manifest import GOLDEN, Manifest, strict_json
from ..payload import Payload, parse
from ..runtime.session import Session

_RUNS = 5
#: What a child may say at most: one line.
_MAX_ANSWER_BYTES = 64 << 10


class NoVerdict(Exception):
    """The trial ended without an answer about the payload: memory, a signal, time."""


#: Returns for a payload that passes. Raises `PayloadError` (final) or `NoVerdict`.
Trial = Callable[[bytes], None]


@dataclass(frozen=True)
class Limits:
    """What `device.json` allows one payload."""

    max_payload_bytes: float
    latency_factor: float
    max_distance: float | None


@dataclass(frozen=True)
class ChildTrial:
    """A trial in a process of its own; `threads` as a request has them. `before`: the base that serves, where `base` is new."""

    base: Path
    limits: Limits
    threads: int = 1
    timeout_s: float = 600.0
    before: Path | None = None

    def __call__(self, data: bytes) -> None:
        before = None if self.before is None else str(self.before.absolute())
        task = json.dumps(
            {
                "base": str(self.base.absolute()),
                "before": before,
                "limits": asdict(self.limits),
                "threads": self.threads,
            }
        )
        command = [sys.executable, "-P", "-m", "lrcompress.edge.probe"]
        path = os.pathsep.join(filter(None, [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH")]))
        try:
            child = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, cwd="/",
                env={**os.environ, "PYTHONPATH": path},
            )  # fmt: skip
        except OSError as e:
            raise NoVerdict(f"no process for the trial: {e.strerror or e}") from e
        try:
            answer, _ = child.communicate(task.encode() + b"\n" + data, self.timeout_s)
        except subprocess.TimeoutExpired as e:
            raise NoVerdict(f"no answer within {self.timeout_s:g} s") from e
        finally:
            if child.poll() is None:
                child.kill()
                child.wait()
            for pipe in (child.stdin, child.stdout):
                if pipe is not None:
                    with contextlib.suppress(OSError):
                        pipe.close()
        _conclude(answer[:_MAX_ANSWER_BYTES], child.returncode)


def _conclude(answer: bytes, code: int) -> None:
    """Raise what a child's answer means; return if it passed. Only a whole answer of a child that ended well counts."""
    if code < 0:
        names = {s.value: s.name for s in signal.Signals}
        raise NoVerdict(f"the trial was ended by {names.get(-code, f'signal {-code}')}")
    try:
        found = strict_json(answer)
        passed, error = found["passed"], found["error"]
    except (ValueError, KeyError, TypeError):
        raise NoVerdict(f"the trial ended with exit code {code} and no answer") from None
    if code or not isinstance(passed, bool):
        raise NoVerdict(str(error))
    if not passed:
        raise PayloadError(*(str(error[k]) for k in ("where", "expected", "got", "remedy")))


# in the child, see `probe` ---------------------------------------------------------------------------------------------


def judge_base(base: Path, before: Path, limits: Limits, threads: int) -> None:
    """Raise `PayloadError` unless a new base answers its own golden inputs as it should, within the latency that is allowed.

    Anything else that it raises is no verdict.
    """
    manifest = Manifest.load(base)
    manifest.check_runtime(ort.__version__)
    serving = Session(before, threads=threads, verify=False)
    try:
        golden = load_golden(base / GOLDEN)
        _, before_ms = _fastest(serving, golden)
        del serving  # one model at a time in memory
        outputs, ms = _fastest(Session(base, threads=threads, manifest=manifest, verify=False), golden)
    except (ManifestError, DataError) as e:
        if "alloc" in e.got.lower():
            raise MemoryError(e.got) from e
        raise PayloadError("base: trial", "a model that loads, and answers its golden inputs", e.got) from e
    report = compare(golden.compressed, outputs, manifest.tolerance)
    if not report.passed:
        worst = report.worst
        raise PayloadError(
            f"base: golden output {worst.name}", f"a difference of at most {worst.tolerance:.3g}", f"{worst.max_abs_diff:.3g}"
        )  # fmt: skip
    if ms > limits.latency_factor * before_ms:
        raise PayloadError(
            "base: latency", f"at most {limits.latency_factor:g} times the {before_ms:.2f} ms of the base before", f"{ms:.2f} ms"
        )  # fmt: skip


def _fastest(session: Session, golden: GoldenSet) -> tuple[dict[str, np.ndarray], float]:
    """Return the outputs of a base alone, and the fastest of some runs in ms."""
    base, outputs, best = session.prepare(None), dict[str, np.ndarray](), math.inf
    for _ in range(_RUNS):
        started = time.perf_counter()
        outputs = session.run_with(base, golden.inputs)
        best = min(best, (time.perf_counter() - started) * 1000)
    return outputs, best


def judge(data: bytes, session: Session, golden: GoldenSet, limits: Limits) -> tuple[float, float]:
    """Return what a request takes with the payload and without, in ms. Raises `PayloadError` for the first check that fails.

    Anything else that it raises (memory, disk) is no verdict on the payload.
    """
    if len(data) > limits.max_payload_bytes:
        raise PayloadError("payload", f"at most {int(limits.max_payload_bytes)} bytes, as device.json says", len(data))
    payload = parse(data)
    outputs, ms, base_ms = _timed(session, payload, golden)
    check_golden(payload, session, outputs)
    if limits.max_distance is not None:
        report = compare(golden.compressed, outputs, limits.max_distance)
        if not report.passed:
            worst = report.worst
            raise PayloadError(
                f"payload: output {worst.name}",
                f"at most {worst.tolerance:.3g} from the base",
                f"{worst.max_abs_diff:.3g}",
            )
    if ms > limits.latency_factor * base_ms:
        raise PayloadError(
            "payload: latency", f"at most {limits.latency_factor:g} times the base's {base_ms:.2f} ms", f"{ms:.2f} ms"
        )
    return ms, base_ms


def check_golden(payload: Payload, session: Session, outputs: Mapping[str, np.ndarray]) -> ParityReport:
    """Compare outputs on the golden inputs with what the payload brings. Raises `PayloadError` for a difference."""
    bad = sorted(n for n, v in outputs.items() if np.issubdtype(v.dtype, np.floating) and not np.isfinite(v).all())
    if bad:
        raise PayloadError(f"payload: output {bad[0]}", "finite answers to the golden inputs", "NaN or infinity")
    if set(payload.golden) != set(outputs):
        raise PayloadError(
            "payload: golden", f"outputs {', '.join(sorted(outputs))}", ", ".join(sorted(payload.golden)) or "none"
        )
    report = compare_projected(payload.golden, outputs, session.manifest.tolerance)
    if not report.passed:
        worst = report.worst
        raise PayloadError(
            f"payload: golden output {worst.name}",
            f"a difference of at most {worst.tolerance:.3g}",
            f"{worst.max_abs_diff:.3g}",
        )
    return report


def _timed(session: Session, payload: Payload, golden: GoldenSet) -> tuple[dict[str, np.ndarray], float, float]:
    """Return the outputs, and the fastest of some runs in ms with and without the payload.

    The fastest is the run that nothing else disturbed, and taking turns lets both meet the same disturbance.
    """
    prepared, base = session.prepare(payload), session.prepare(None)
    outputs: dict[str, np.ndarray] = {}
    best = {True: math.inf, False: math.inf}
    for _ in range(_RUNS):
        for with_payload in (False, True):
            started = time.perf_counter()
            try:
                found = session.run_with(prepared if with_payload else base, golden.inputs)
            except DataError as e:
                if not with_payload or "alloc" in e.got.lower():
                    raise MemoryError(e.got) from e  # the base itself fails, or memory does: no verdict on the payload
                raise PayloadError("payload: trial", "an answer to the golden inputs", e.got) from e
            best[with_payload] = min(best[with_payload], (time.perf_counter() - started) * 1000)
            outputs = found if with_payload else outputs
    return outputs, best[True], best[False]
