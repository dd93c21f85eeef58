"""A plan for a device in words: what it comes to, and how an alternative compares with what was taken."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .candidates import Candidate, Limits
from .rankplan import Planned


def advice(layers: Sequence[Planned], rows: Sequence[Mapping[str, Any]], limits: Limits) -> str:
    """Say what the plan comes to: dense where no factors pay, how many layers are factorized elsewhere."""
    changed = [p for p in layers if p.choice.form != "dense"]
    used = sorted({p.bits for p in layers})
    bits = f"{' and '.join(map(str, used))} bits"
    fitting = [str(r["name"]) for r in rows if r["fits"]]
    if not changed:
        return f"stay dense, in {bits}: within this budget no factors lose less"
    if fitting:
        return (
            f"factorize {len(changed)} of {len(layers)} layers, in {bits}; {fitting[-1]} would fit too, and lose more"
        )
    return f"factorize {len(changed)} of {len(layers)} layers, in {bits}; no dense network of one precision fits"


def why(other: Candidate, taken: Candidate, dearer: float) -> str:
    """Compare an alternative with what was taken: bytes, milliseconds, loss."""
    size, ms = other.n_bytes - taken.n_bytes, other.ms - taken.ms
    words = [f"{abs(size):,} bytes {'more' if size > 0 else 'fewer'}"] if size else []
    if abs(ms) > 5e-5:
        words.append(f"{abs(ms):.3g} ms {'more' if ms > 0 else 'less'}")
    words.append(f"a loss of {other.loss:.3g} instead of {taken.loss:.3g}")
    worth = (
        "; elsewhere that is worth more" if dearer > 0 and (size < 0 or ms < -5e-5 or other.loss < taken.loss) else ""
    )
    return ", ".join(words) + worth
