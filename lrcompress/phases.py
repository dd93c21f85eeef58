"""Which devices a release is for while it is rolled out: the same answer on the device and at the publisher's desk.

A device that follows the channel `canary` takes a candidate at once; one that follows `stable` takes it when its place
in the order of that rollout is below the percentage. The place is a hash of the device's id and the payload, so that
nobody draws lots, growing percentages only add devices, and another payload meets another order.
"""

from __future__ import annotations

import hashlib

CHANNELS = ("stable", "canary")
#: What `place` counts up to: percentages may have two decimals. TUF signs whole numbers only.
PLACES = 10_000
#: Names of the targets of a group, below <model>/<group>/: what everybody gets, and what some already get.
STABLE, CANDIDATE = "payload.safetensors", "candidate.safetensors"
#: What the names of packs end with (see `packs`).
PACK = ".base"


def place(device: str, sha256: str) -> int:
    """Return the place of a device, 0…9999, in the rollout of a payload; uniform over devices."""
    digest = hashlib.sha256(f"{sha256}\0{device}".encode()).digest()
    return int.from_bytes(digest[:8], "big") * PLACES >> 64


def takes_candidate(device: str | None, channel: str, sha256: str, places: int) -> bool:
    """Tell whether a device takes a candidate that is for the first `places` of 10,000. Without an id: with everybody else."""
    if channel == "canary" or places >= PLACES:
        return True
    return device is not None and place(device, sha256) < places


def delta_name(base: str, result: str) -> str:
    """Return the name, below <model>/<group>/, of what turns the payload `base` into the payload `result`."""
    return f"{base[:16]}-{result[:16]}.delta"


def pack_name(start: str | None, result: str) -> str:
    """Return the name, below <model>/<group>/, of what brings the base `result` to a device with the base `start` (None: any)."""
    return f"{'' if start is None else f'{start[:16]}-'}{result[:16]}{PACK}"
