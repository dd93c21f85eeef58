"""What runs on a device: serve, update, fall back. Needs the base install only.

from lrcompress.edge import Device
device = Device("/var/lib/model")
y = device.infer({"x": x})["output"]
device.update()
"""

from __future__ import annotations

from .device import Device

__all__ = ["Device"]
