"""What a graph needs of the runtime: the oldest version of ONNX Runtime that runs its operators, and what asks for it.

    needs(model)     # Need("1.22.0", "GatherBlockQuantized")

Releases and the opsets they brought are ONNX Runtime's own table of versions; operators of its own domain count from the
release that took the types used here.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import onnx

from ..errors import ProfileError
from ..plan.profile import DeviceProfile

#: What the part that runs on a device asks for, whatever the graph.
FLOOR = "1.22.0"
#: Opset and IR version: the first release that knows them.
_OPSETS = {20: "1.17.0", 21: "1.18.0", 22: "1.21.0", 23: "1.22.0"}
_IRS = {9: "1.17.0", 10: "1.18.0", 11: "1.22.0"}
_OPERATORS = {"MatMulNBits": "1.17.0", "GatherBlockQuantized": "1.22.0"}


@dataclass(frozen=True)
class Need:
    """The oldest version that will do, and why."""

    version: str
    why: str


def key(version: str) -> tuple[int, ...]:
    """Return a version as something that compares."""
    return tuple(int(p) for p in version.split(".")[:3] if p.isdigit())


def needs(model: onnx.ModelProto) -> Need:
    """Return the oldest version of ONNX Runtime that runs `model`."""
    return max(_each(model), key=lambda n: key(n.version))


def _each(model: onnx.ModelProto) -> Iterator[Need]:
    yield Need(FLOOR, "lrcompress on the device")
    for opset in model.opset_import:
        if opset.domain in ("", "ai.onnx") and opset.version > 19:
            yield Need(_OPSETS.get(opset.version, "99.0.0"), f"opset {opset.version}")
    if model.ir_version > 8:
        yield Need(_IRS.get(model.ir_version, "99.0.0"), f"IR version {model.ir_version}")
    for node in model.graph.node:
        if node.op_type in _OPERATORS:
            yield Need(_OPERATORS[node.op_type], node.op_type)


def check_device(need: Need, profile: DeviceProfile) -> None:
    """Raise `ProfileError` where a device of `profile` may have a runtime that is too old for the graph."""
    low, high = profile.ort.min, profile.ort.max
    if key(low) >= key(need.version):
        return
    got = f"ort.min {low}" + (f", ort.max {high}" if high else "")
    remedy = f"install {need.version} on the devices and say so in the profile"
    if high is not None and key(high) < key(need.version):
        remedy = "update the devices: no version the profile allows will do"
    raise ProfileError(
        f"device profile {profile.name}", f"ONNX Runtime {need.version} or later, for {need.why}", got, remedy
    )
