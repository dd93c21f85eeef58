"""Make stored arrays fit a model's inputs, or say in one line why they do not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from ..errors import DataError
from ..files import sha256_json
from ._preprocess import Preprocess
from ._types import InputLike, array_digest

_LABELS = ("y", "label", "labels")
#: Rows looked at when a whole array is checked for NaN.
_CHECK_BLOCK = 4096


class FittedStore:
    """Arrays by input name, preprocessed and cast when they are read."""

    def __init__(
        self,
        arrays: dict[str, np.ndarray],
        preprocess: Mapping[str, Preprocess],
        dtypes: Mapping[str, str],
        origin: str,
    ) -> None:
        self._arrays, self._preprocess, self._dtypes, self._origin = arrays, dict(preprocess), dict(dtypes), origin

    def __len__(self) -> int:
        return len(next(iter(self._arrays.values())))

    def read(self, index: np.ndarray) -> dict[str, np.ndarray]:
        out = {}
        for name, array in self._arrays.items():
            x = array[index]
            if name in self._preprocess:
                x = self._preprocess[name](x, name)
            wanted = self._dtypes.get(name)
            out[name] = np.ascontiguousarray(x if wanted is None else x.astype(wanted, copy=False))
        return out

    def digest(self) -> str:
        steps = {k: v.as_dict() for k, v in sorted(self._preprocess.items())}
        return sha256_json({"arrays": array_digest(self._arrays), "preprocess": steps, "dtypes": self._dtypes})


def split_labels(arrays: Mapping[str, np.ndarray]) -> tuple[dict[str, np.ndarray], np.ndarray | None]:
    """Return the arrays without the label array, and the label array."""
    label = next((n for n in _LABELS if n in arrays), None)
    return {k: v for k, v in arrays.items() if k != label}, None if label is None else arrays[label]


def fit(
    arrays: Mapping[str, np.ndarray],
    labels: np.ndarray | None,
    inputs: Sequence[InputLike],
    preprocess: Mapping[str, Preprocess],
    origin: str,
) -> FittedStore:
    """Return a store of `arrays` under the model's input names, each checked once, here.

    Raises `DataError`: names that do not match, unequal lengths, no sample, NaN, a shape or dtype that cannot be fed.
    """
    if not arrays:
        raise DataError(origin, "at least one array of inputs", "none")
    named = _names(arrays, inputs, origin)
    sizes = {name: _length(array, name, origin) for name, array in named.items()}
    if labels is not None:
        sizes["labels"] = _length(np.asarray(labels), "labels", origin)
    if len(set(sizes.values())) != 1:
        raise DataError(
            origin, "the same number of samples in every array", ", ".join(f"{k}: {v}" for k, v in sizes.items())
        )
    if next(iter(sizes.values())) == 0:
        raise DataError(origin, "at least one sample", "none")
    specs = {s.name: s for s in inputs}
    unknown = sorted(set(preprocess) - set(named))
    if unknown:
        raise DataError(f"{origin}: preprocess", f"an input among {', '.join(named)}", unknown[0])
    dtypes: dict[str, str] = {}
    for name, array in named.items():
        if name in specs:
            dtypes[name] = _check_dtype(array, specs[name], name in preprocess, origin)
        _check_finite(array, name, origin)
    if labels is not None:
        _check_finite(np.asarray(labels), "labels", origin)
    store = FittedStore(named, preprocess, dtypes, origin)
    first = store.read(np.arange(1))
    for name, spec in specs.items():
        check_shape(first[name].shape, spec, origin)
    return store


def check_shape(shape: tuple[int, ...], spec: InputLike, origin: str) -> None:
    """Raise `DataError` unless `shape` (first axis: sample) can be fed to `spec`; words are free axes."""
    wanted = spec.shape
    fits = len(shape) == len(wanted) and all(
        isinstance(w, str) or w == s for s, w in zip(shape[1:], wanted[1:], strict=False)
    )
    if not fits:
        remedy = (
            "set preprocess.layout: nhwc_to_nchw"
            if len(shape) == 4 and shape[-1] in (1, 3)
            else "check the array's axes"
        )
        raise DataError(f"{origin}: {spec.name}", f"samples of shape {_dims(wanted[1:])}", _dims(shape[1:]), remedy)


def _dims(shape: Sequence[int | str]) -> str:
    return "(" + ", ".join(map(str, shape)) + ")"


def _names(arrays: Mapping[str, np.ndarray], inputs: Sequence[InputLike], origin: str) -> dict[str, np.ndarray]:
    """Return the arrays under the model's names; a single input takes a single array whatever its name."""
    wanted = [s.name for s in inputs]
    if not wanted or set(arrays) == set(wanted):
        return {n: arrays[n] for n in (wanted or arrays)}
    if len(wanted) == 1 and len(arrays) == 1:
        return {wanted[0]: next(iter(arrays.values()))}
    missing = [n for n in wanted if n not in arrays]
    if missing:
        raise DataError(
            origin,
            f"arrays named {', '.join(wanted)}",
            ", ".join(sorted(arrays)),
            "rename them after the model's inputs",
        )
    # Extra arrays (file names, genres) are nobody's input.
    return {n: arrays[n] for n in wanted}


def _length(array: np.ndarray, name: str, origin: str) -> int:
    if array.ndim == 0:
        raise DataError(f"{origin}: {name}", "an array whose first axis is the sample", "a single number")
    return len(array)


def _check_dtype(array: np.ndarray, spec: InputLike, preprocessed: bool, origin: str) -> str:
    """Return the dtype to feed; refuse what would lose meaning on the way."""
    where, wanted = f"{origin}: {spec.name}", np.dtype(spec.dtype)
    if array.dtype.kind not in "biuf":
        raise DataError(where, f"numbers ({spec.dtype})", str(array.dtype))
    if wanted.kind == "f":
        if array.dtype == np.uint8 and not preprocessed:
            raise DataError(
                where,
                f"{spec.dtype} values",
                "uint8 images",
                "say in a recipe how they are scaled (data.preprocess), or scale them first",
            )
        return spec.dtype
    if array.dtype.kind == "f":
        raise DataError(where, f"whole numbers ({spec.dtype})", str(array.dtype))
    if array.size and wanted.kind in "iu":
        info = np.iinfo(wanted)
        low, high = int(array.min()), int(array.max())
        if low < info.min or high > info.max:
            raise DataError(where, f"values that {spec.dtype} holds", f"{low}…{high}")
    return spec.dtype


def _check_finite(array: np.ndarray, name: str, origin: str) -> None:
    if array.dtype.kind != "f":
        return
    for start in range(0, len(array), _CHECK_BLOCK):
        good = np.isfinite(array[start : start + _CHECK_BLOCK])
        if not good.all():
            row = start + int(np.argwhere(~good)[0][0])
            raise DataError(
                f"{origin}: {name}", "finite numbers", f"NaN or infinity in sample {row}", "clean or drop that sample"
            )
