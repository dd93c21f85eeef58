"""The smallest form of a correction that still answers alike: encodings of the whole, and deltas from what devices have."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from .. import deltas
from .. import payload as payloads
from ..encodings import as_stored
from ..errors import CommandError, PayloadError
from ..files import sha256_bytes
from ..golden import compare, load_golden, project
from ..manifest import GOLDEN, Manifest
from ..runtime import Session

#: How far an encoding may move a golden output from what the f32 payload answers, relative to max(1, max|output|).
ENCODING_TOLERANCE = 1e-2
#: In the order in which they are tried; of equal sizes the first one is taken.
ENCODINGS = ("int8", "f16", "f32", "int4")
#: What four bits may change of the largest number where nobody asked for them: the last bits of float32.
_UNCHANGED = 2e-6
#: What the signed entry of a delta costs every device: a delta must save more.
DELTA_ENTRY_BYTES = 320


@dataclass(frozen=True)
class Encoded:
    """A payload that any device can take whole, and what leads to it from earlier ones: their sha256 -> delta."""

    data: bytes
    encoding: str
    sizes: dict[str, int]
    deltas: dict[str, bytes] = field(default_factory=dict)

    @property
    def sha256(self) -> str:
        return sha256_bytes(self.data)


def choose(
    exported: Path,
    manifest: Manifest,
    kind: str,
    tensors: Mapping[str, np.ndarray],
    encoding: str = "auto",
    earlier: Sequence[bytes] = (),
) -> Encoded:
    """Return the smallest faithful encoding and the sizes of all that were tried. `earlier`: payloads in the field, newest first.

    Golden outputs are computed from what a device will decode. Raises `PayloadError` for an encoding that is asked for
    and moves them too far, or a delta that has nothing to start from.
    """
    if encoding not in ("auto", "delta", *ENCODINGS):
        raise CommandError("lrcompress publish add --encoding", f"auto, delta, {', '.join(ENCODINGS)}", encoding)
    if encoding == "delta" and not earlier:
        raise PayloadError(
            "--encoding delta", "an earlier payload of this group", "none in the repository", "publish with auto"
        )
    work = _Work(exported, manifest, kind, tensors)
    sizes: dict[str, int] = {}
    best: tuple[bytes, str] | None = None
    for name in work.encodings() if encoding in ("auto", "delta") else (encoding,):
        try:
            data, faithful = work.encode(name)
        except PayloadError:
            if encoding == name:
                raise
            continue
        sizes[name] = len(data)
        if encoding == name and not faithful:
            raise PayloadError(
                f"--encoding {name}",
                f"golden outputs within {ENCODING_TOLERANCE:.0%} of the f32 payload's",
                "further away",
                "train it so: adapt --encoding int4" if name == "int4" else "use f16 or auto",
            )
        if (best is None or len(data) < len(best[0])) and (faithful or name == "f32"):
            best = data, name
    assert best is not None
    if encoding not in ("auto", "delta"):
        return Encoded(*best, sizes)
    return _with_deltas(work, Encoded(*best, sizes), earlier, must=encoding == "delta")


def _with_deltas(work: _Work, whole: Encoded, earlier: Sequence[bytes], *, must: bool) -> Encoded:
    """Add deltas that save something, from int8 codes on the scales of the newest earlier payload where that is shorter."""
    earlier = [data for data in earlier if data != whole.data]
    if not earlier:
        return whole
    found = {sha256_bytes(old): deltas.build(old, whole.data) for old in earlier}
    data, newest = whole.data, sha256_bytes(earlier[0])
    if whole.encoding == "int8" and (scales := payloads.scales_of(earlier[0])):
        other, faithful = work.encode("int8", scales)
        if faithful and other != data and len(deltas.build(earlier[0], other)) < len(found[newest]):
            data, found = other, {sha256_bytes(old): deltas.build(old, other) for old in earlier if old != other}
    if not found:
        return Encoded(data, whole.encoding, whole.sizes)
    keep = {sha: delta for sha, delta in found.items() if must or len(delta) + DELTA_ENTRY_BYTES < len(data)}
    sizes = {**whole.sizes, "delta": len(next(iter(keep.values())))} if keep else whole.sizes
    return Encoded(data, whole.encoding, sizes, keep)


class _Work:
    """One correction, the runtime it is tried in, and what it answers as f32."""

    def __init__(self, exported: Path, manifest: Manifest, kind: str, tensors: Mapping[str, np.ndarray]) -> None:
        self._manifest, self._kind, self._tensors = manifest, kind, tensors
        self._golden = load_golden(exported / GOLDEN)
        self._session = Session(exported, threads=1, manifest=manifest, verify=False)
        self._reference = self._answers(self._build("f32"))

    def encodings(self) -> tuple[str, ...]:
        """Return those to choose from: four bits only where nothing is lost, as of an adapter that was trained for them."""
        held = all(
            np.abs(as_stored(v, "int4") - v).max(initial=0) <= _UNCHANGED * np.abs(v).max(initial=0)
            for v in self._tensors.values()
        )
        return tuple(e for e in ENCODINGS if held or e != "int4")

    def _build(
        self,
        encoding: str,
        scales: Mapping[str, np.ndarray] | None = None,
        golden: Mapping[str, np.ndarray] | None = None,
    ) -> bytes:
        return payloads.build(
            self._tensors, manifest=self._manifest, kind=self._kind, encoding=encoding, scales=scales, golden=golden
        )

    def _answers(self, data: bytes) -> Mapping[str, np.ndarray]:
        self._session.swap(payloads.parse(data))
        return self._session.run(self._golden.inputs)

    def encode(self, encoding: str, scales: Mapping[str, np.ndarray] | None = None) -> tuple[bytes, bool]:
        """Return the payload with its golden outputs, and whether it answers like f32."""
        bare = self._build(encoding, scales)
        outputs = self._answers(bare)
        golden = project(outputs, max(1024, len(bare) // 10) // 2)
        faithful = compare(self._reference, outputs, ENCODING_TOLERANCE).passed
        return self._build(encoding, scales, golden), faithful
