"""`arm64:CPU`: an emulated 64-bit ARM processor with the same ONNX Runtime. It answers; its times mean nothing.

Bare `max` is refused: with SME the emulator computes some int8 kernels wrongly. `max,sme=off` is fine.
"""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from pathlib import Path

from ...errors import CommandError, HostError, ParityError
from ...manifest import GRAPH
from ...progress import Progress
from ..arm_root import WHERE as EMULATION
from ..arm_root import arm_root, cpus
from ..jobs import JOB, RESULT, read_answers, write_job
from . import WHERE, Answers, Job

CPU_CLASS = "arm64"
#: The weakest processor in common use: no dot product, no half-precision arithmetic.
DEFAULT_CPU = "cortex-a53"
_RUNNER = Path(__file__).parent.parent / "golden_runner.py"
_TIMEOUT_S = 1800


def check(detail: str) -> None:
    """Refuse what can be refused without the emulator."""
    cpu, _, options = detail.partition(",")
    if detail and not re.fullmatch(r"[a-z0-9][a-z0-9.-]*(,[a-z0-9-]+=[a-z0-9]+)*", detail):
        raise CommandError(WHERE, "arm64:CPU", f"arm64:{detail}", "for example arm64:cortex-a53")
    if cpu == "max" and "sme=off" not in options.split(","):
        raise CommandError(WHERE, "a processor that is emulated correctly", f"arm64:{detail}", "use arm64:max,sme=off")


def run(detail: str, job: Job, progress: Progress) -> Answers:
    """Answer all cases in one emulated process."""
    cpu = detail or DEFAULT_CPU
    root = arm_root(progress)
    if cpu.partition(",")[0] not in cpus(root):
        raise CommandError(WHERE, f"one of {', '.join(cpus(root))}", f"arm64:{cpu}")
    with tempfile.TemporaryDirectory() as scratch, progress.task(f"validate on arm64:{cpu}", total=1) as advance:
        folder = Path(scratch)
        write_job(folder, job, model=str(job.exported.resolve() / GRAPH), at=folder)
        _emulate(root, cpu, folder / JOB)
        outputs = read_answers(folder / RESULT, job, where=f"arm64:{cpu}")
        advance(1, cpu)
    return Answers(outputs)


def _emulate(root: Path, cpu: str, job: Path) -> None:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")} | {"QEMU_CPU": cpu}
    command = [str(root / "bin/arm-python"), str(_RUNNER), str(job)]
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            errors="replace",
            env=environment,
            stdin=subprocess.DEVNULL,
            timeout=_TIMEOUT_S,
        )
    except subprocess.TimeoutExpired as e:
        raise HostError(
            f"{EMULATION} ({cpu})", f"answers within {_TIMEOUT_S} s", "none", "validate a smaller model there"
        ) from e
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if line.strip()]
        got = said[-1] if said else f"signal {-done.returncode}" if done.returncode < 0 else f"exit {done.returncode}"
        raise ParityError(f"arm64:{cpu}", "a model that loads and answers", got)
