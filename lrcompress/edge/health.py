"""The operator's own check of a payload in use: a program whose exit code 0 says that the device is well.

It runs once before the payload is activated, for a device that is ill already must not be blamed on it, and again and
again while the payload is on probation.
"""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Sequence
from pathlib import Path

from ..errors import PayloadError
from .trial import NoVerdict

BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
#: Of what the program says on its standard error, for the reason that is kept.
_SAID_CHARACTERS = 120


def boot_id() -> str:
    """Return what tells one boot of this machine from the next; empty where the kernel does not say."""
    try:
        return BOOT_ID.read_text().strip()
    except OSError:
        return ""


def check_health(command: Sequence[str], timeout_s: float, about: dict[str, str]) -> None:
    """Run the operator's program with `about` in its environment. Raises `PayloadError` if it says no, `NoVerdict` if it says nothing."""
    where = f"health_command {command[0]}"
    try:
        child = subprocess.Popen(
            list(command), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, cwd="/",
            env={**os.environ, **about}, start_new_session=True,
        )  # fmt: skip
    except (OSError, ValueError) as e:
        raise NoVerdict(f"{where}: {getattr(e, 'strerror', None) or e}") from e
    try:
        _, said = child.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired as e:
        raise NoVerdict(f"{where}: no answer within {timeout_s:g} s") from e
    finally:
        _end(child)
    if child.returncode < 0:
        raise NoVerdict(f"{where}: ended by signal {-child.returncode}")
    if child.returncode:
        text = " ".join(said.decode(errors="replace").split())[-_SAID_CHARACTERS:]
        raise PayloadError(
            where, "exit code 0 while the payload is in use", f"{child.returncode}{': ' if text else ''}{text}"
        )


def _end(child: subprocess.Popen[bytes]) -> None:
    """End the program and whatever it started."""
    if child.poll() is None:
        try:
            os.killpg(child.pid, signal.SIGKILL)
        except OSError:
            child.kill()
        child.wait()
    if child.stderr is not None:
        child.stderr.close()
