"""How stored samples become model inputs: layout, scale, mean and standard deviation, in this order.

Preprocess(layout="nhwc_to_nchw", scale=1 / 255, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import DataError

LAYOUTS = ("nhwc_to_nchw", "nchw_to_nhwc")


@dataclass(frozen=True)
class Preprocess:
    """One input's way from storage to the model: y = (layout(x)·scale − mean) / std, mean and std per channel."""

    layout: str | None = None
    scale: float = 1.0
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    resize: int | None = None

    @classmethod
    def of(cls, value: Preprocess | Mapping[str, Any]) -> Preprocess:
        """Return `value`, or the one that a plain mapping spells."""
        if isinstance(value, Preprocess):
            return value
        unknown = sorted(set(value) - set(cls.__dataclass_fields__))
        if unknown:
            raise DataError("preprocess", f"one of {', '.join(cls.__dataclass_fields__)}", unknown[0])
        lists = {k: tuple(float(v) for v in value.get(k) or ()) for k in ("mean", "std")}
        return cls(**{**{k: v for k, v in value.items() if v is not None}, **lists})

    def __call__(self, x: np.ndarray, name: str) -> np.ndarray:
        """Return `x` (samples first) as float32; raises `DataError` where layout or channels do not fit."""
        where = f"preprocess of {name}"
        if self.layout is not None:
            if self.layout not in LAYOUTS:
                raise DataError(where, f"a layout among {', '.join(LAYOUTS)}", self.layout)
            if x.ndim != 4:
                raise DataError(where, "images with 4 axes", f"shape {x.shape}", "drop 'layout'")
            x = np.moveaxis(x, 3, 1) if self.layout == "nhwc_to_nchw" else np.moveaxis(x, 1, 3)
        y = np.ascontiguousarray(x, dtype=np.float32)
        if self.scale != 1.0:
            y = y * np.float32(self.scale)
        axis = 1 if self.layout != "nchw_to_nhwc" and y.ndim > 2 else y.ndim - 1
        for values, subtract in ((self.mean, True), (self.std, False)):
            if not values:
                continue
            if len(values) not in (1, y.shape[axis]):
                raise DataError(
                    where, f"{y.shape[axis]} values of mean and std, one per channel", len(values), "check the layout"
                )
            shape = [1] * y.ndim
            shape[axis] = len(values)
            column = np.asarray(values, np.float32).reshape(shape)
            y = y - column if subtract else y / column
        return np.ascontiguousarray(y, dtype=np.float32)

    def as_dict(self) -> dict[str, Any]:
        return {
            "layout": self.layout,
            "scale": self.scale,
            "mean": list(self.mean),
            "std": list(self.std),
            "resize": self.resize,
        }
