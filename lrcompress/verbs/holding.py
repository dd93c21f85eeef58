"""What is held out: samples to select on beside those to train on."""

from __future__ import annotations

import numpy as np

from ..data import Data
from ..errors import DataError

#: Samples that are held out where no others are given, at most.
_HELD_OUT = 2000


def split(data: Data, select: Data | None) -> tuple[Data, Data]:
    """Return samples to train on and samples to select on: every tenth of `data` where no others are given."""
    width = 2 if data.pairs else 1
    units = len(data) // width
    if units < 2:
        what = "at least 2 pairs" if data.pairs else "at least 2 samples"
        raise DataError("recovery data", f"{what} to train on", units, "give more data")
    if select is not None:
        _check_alike(data, select)
        return data, select
    held = min(max(units // 10, 1), _HELD_OUT // width)
    # Spread evenly, so that ordered files are represented.
    chosen = np.unique(np.linspace(0, units - 1, held).round().astype(int))
    rest = np.setdiff1d(np.arange(units), chosen)

    def samples(which: np.ndarray) -> np.ndarray:
        found: np.ndarray = (which[:, None] * width + np.arange(width)).reshape(-1)
        return found

    return data.take(samples(rest)), data.take(samples(chosen))


def _check_alike(data: Data, select: Data) -> None:
    """Refuse samples to select on that are not such as are trained on; whole numbers may be more or fewer: tokens."""
    if len(select) == 0:
        raise DataError("recovery data: select", "at least one sample", "none")
    one, other = (next(iter(d.take(slice(0, 2 if d.pairs else 1)).batches(2))) for d in (data, select))
    if set(one.inputs) != set(other.inputs):
        raise DataError("recovery data: select", f"inputs {', '.join(one.inputs)}", ", ".join(other.inputs))
    for name, a in one.inputs.items():
        b = other.inputs[name]
        if a.ndim != b.ndim or (a.dtype.kind == "f" and a.shape[1:] != b.shape[1:]):
            raise DataError(f"recovery data: select, {name}", f"samples of shape {a.shape[1:]}", b.shape[1:])
