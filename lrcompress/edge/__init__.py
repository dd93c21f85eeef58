"""What runs on a device: serve, update, fall back. Needs the base install only.

from lrcompress.edge import Device
device = Device("/var/lib/model")
y = device.infer({"x": x})["output"]
device.update()

session = EdgeSession("/var/lib/model")      # in an application beside the agent: follows what is committed
"""

from __future__ import annotations

from .device import Device
from .session import EdgeSession

__all__ = ["Device", "EdgeSession"]
