"""Leave out one fsync, rename or deletion at a time and see which scene notices: `python -m tests.faults.mutations [WORD]…`.

The list is not written by hand: it is every kind of call that any scene makes (who asked, what for, of which file), so
a new fsync that nothing needs, or one that no scene can miss, shows by itself. A rename that is left out becomes a
copy. What `NOT_NEEDED` names is kept for a reason that a model of power cuts cannot see.
"""

from __future__ import annotations

import random
import re
import sys
import time
from collections.abc import Callable

from lrcompress.errors import LrcompressError
from tests.faults.powercut import Op, Recorder
from tests.faults.scenes import Scene, Violation, World, killed_at, scenes

#: Calls whose absence no image shows, with the reason why they are made all the same.
NOT_NEEDED: dict[str, str] = {
    "StatusLog.write: rename log.jsonl to log.1.jsonl": "the log promises nothing; a copy would write 256 KiB twice",
    "bring: unlink dl/SHA.part": "the commit sweeps the delta; this one makes room before the trial",
    "Staging._unpack: unlink dl/SHA.part": "the commit sweeps the pack; this one makes room before the trial",
    "Bases.admit: sync_folder": "the state's own sync comes after it; a cut between them would have the base fetched again",
}


def kind(op: Op) -> str:
    """Return what a call is for: hashes, versions and the name of the copy left out."""
    text = re.sub(r"[0-9a-f]{64}", "SHA", str(op))
    text = re.sub(r"\.device\.new", "NEW", text)
    text = re.sub(r"device/|device$", "", text)
    text = re.sub(r"state\.[01]", "state.N", text)
    text = re.sub(r"\d+\.root", "N.root", text)
    text = re.sub(r"(metadata/)(default|snapshot|targets|timestamp)", r"\1ROLE", text)
    text = re.sub(r"(dl/SHA\.base(?:\.tmp)?|bases/SHA)/\S+", r"\1/FILE", text)
    return re.sub(r"(NEW/factory)/\S+", r"\1/FILE", text).rstrip(" ") or "."


def removable(op: Op) -> bool:
    return op.name in ("sync", "sync_folder", "rename", "unlink")


def kinds(world: World) -> dict[str, list[str]]:
    """Return every kind of call that can be left out, with the scenes that make it."""
    found: dict[str, list[str]] = {}
    for one in scenes(world):
        for op in world.record(one).ops:
            if removable(op):
                names = found.setdefault(kind(op), [])
                if one.name not in names:
                    names.append(one.name)
    return found


def caught(world: World, what: str, names: list[str]) -> str:
    """Return the violation that shows when calls of a kind are left out; empty if none does."""

    def drop(op: Op) -> bool:
        return removable(op) and kind(op) == what

    acts = [s for s in scenes(world) if s.name in names]

    def after_a_kill() -> str:
        """What a process left that was killed is made durable by the next one only, so look at the two of them."""
        for one in [s for s in acts if s.act is not None][:3]:
            for call in range(len(world.record(one).ops) - 1, 3, -1):
                found = _first(world, one, killed_at(world, one, call, drop=drop), 6, drop)
                if found:
                    return f"killed before call {call}, started again: {found}"
        return ""

    if what.startswith("mend: sync"):
        return after_a_kill()
    for most in (12, 64):  # few images of every scene first: what is noticed is noticed soon
        for one in acts:
            try:
                found = _first(world, one, world.record(one, drop=drop), most, drop)
            except (LrcompressError, Violation) as e:  # the act itself fails
                found = " ".join(re.sub(r"[0-9a-f]{64}|/\S*/live/device/", "", f"{one.name}: {e}").split())[:150]
            if found:
                return found
    return after_a_kill()


def _first(world: World, one: Scene, disk: Recorder, most: int, drop: Callable[[Op], bool]) -> str:
    images = list(world.images(one, disk, most))
    random.Random(0).shuffle(images)
    for call, image, promised in images[: 8 * most]:
        try:
            world.judge(one, image, promised, Recorder(world.live, drop=drop))
        except Exception as e:
            text = re.sub(r"[0-9a-f]{64}", "SHA", f"{one.name}, call {call} of {len(disk.ops)}: {e}")
            text = re.sub(r"/\S*/live/", "", text)
            return " ".join(text.split())[:150]
    return ""


def main() -> int:
    """Print the table; 0 if everything that is needed is missed when it is left out."""
    world, missed = World(), 0
    try:
        for what, names in sorted(kinds(world).items()):
            if sys.argv[1:] and not any(word in what for word in sys.argv[1:]):
                continue
            started = time.perf_counter()
            found = "" if what in NOT_NEEDED else caught(world, what, names)
            if not found and what not in NOT_NEEDED:
                missed += 1
            text = found or f"NOT CAUGHT{': ' + NOT_NEEDED[what] if what in NOT_NEEDED else ''}"
            print(f"| {what} | {text} | {time.perf_counter() - started:.0f} s |", flush=True)
    finally:
        world.close()
    return bool(missed)


if __name__ == "__main__":
    sys.exit(main())
