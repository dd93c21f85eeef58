"""The agent: `update`, again and again, about every `poll_s` seconds.

Devices that were switched on together do not ask together: every wait is drawn anew. After a failure the next poll
comes sooner, then ever later up to the usual pace; a payload that waits for its trial is polled for when it is due.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from datetime import UTC, datetime
from importlib import resources
from typing import Any

from ..errors import LrcompressError
from .device import Device
from .updater import describe_serving

#: The first wait after a failure, and at most how long the first poll after a start is put off.
RETRY_S, START_S = 30.0, 60.0
#: A wait is between these shares of what it would be.
JITTER = (0.8, 1.2)
UNIT = "lrcompress-agent.service"


class Agent:
    """Polls for one device until `stop` is set; `told` hears what every poll came to."""

    def __init__(
        self,
        device: Device,
        *,
        told: Callable[[dict[str, Any]], None] = lambda said: None,
        stop: threading.Event | None = None,
        chance: random.Random | None = None,
        wait: Callable[[float], bool] | None = None,
    ) -> None:
        self._device, self._told = device, told
        self.stop = stop or threading.Event()
        self._chance, self._wait = chance or random.Random(), wait or self.stop.wait
        self._failures = 0

    def run(self) -> None:
        """Poll until told to stop. An update that fails, or another one at work, is no reason to end."""
        poll_s = self._device.settings.poll_s
        if self._wait(self._chance.uniform(0, min(START_S, poll_s))):
            return
        while True:
            try:
                said = self._device.update()
            except LrcompressError as e:
                serving = describe_serving(self._device.serving)
                said = {"state": "failed", "serving": serving, "reason": str(e), "error": e.as_dict()}
            self._failures = self._failures + 1 if said["state"] == "failed" else 0
            self._told(said)
            if self._wait(self.pause_s()):
                return

    def pause_s(self) -> float:
        """Return how long to wait now."""
        pause = poll_s = self._device.settings.poll_s
        if self._failures:
            pause = min(poll_s, RETRY_S * 2 ** min(20, self._failures - 1))
        pending = self._device.status()["pending"]
        if pending is not None and pending["retry_at"] is not None:
            due = (datetime.fromisoformat(pending["retry_at"]) - datetime.now(UTC)).total_seconds()
            if 0 < due < pause:
                return due + self._chance.uniform(0, 1)
        return pause * self._chance.uniform(*JITTER)


def unit() -> str:
    """Return the systemd unit that runs the agent."""
    return (resources.files(__package__) / UNIT).read_text()
