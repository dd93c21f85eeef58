"""A folder of images with `labels.tsv` (columns: file, label), decoded when a batch asks for them."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np

from ..errors import DataError
from ..files import contained, sha256_file, sha256_json
from ._fit import check_shape
from ._preprocess import Preprocess
from ._types import Data, InputLike

_FILE, _LABEL = ("file", "filename", "path"), ("label", "class_index", "y", "labels")


def open_images(folder: Path, inputs: list[InputLike], preprocess: dict[str, Preprocess]) -> Data:
    """Open `folder`; images are resized (short side) and centre-cropped to the model's input size."""
    table = folder / "labels.tsv"
    with table.open(newline="", encoding="utf-8") as f:
        rows = list(csv.DictReader(f, delimiter="\t"))
    columns = list(rows[0]) if rows else []
    file = next((c for c in _FILE if c in columns), None)
    label = next((c for c in _LABEL if c in columns), None)
    if file is None:
        raise DataError(table, f"a column among {', '.join(_FILE)}", ", ".join(columns) or "no row")
    if len(inputs) != 1 or len(inputs[0].shape) != 4:
        raise DataError(folder, "a model with one image input", f"{len(inputs)} inputs")
    try:
        paths = [contained(folder, row[file]) for row in rows]
        labels = None if label is None else np.asarray([int(row[label]) for row in rows])
    except ValueError as e:
        raise DataError(table, "file names inside the folder and whole-number labels", str(e)) from e
    missing = next((p for p in paths if not p.is_file()), None)
    if missing is not None:
        raise DataError(missing, "an image listed in labels.tsv", "no such file")
    spec = inputs[0]
    if np.dtype(spec.dtype).kind == "f" and spec.name not in preprocess:
        raise DataError(
            folder, f"{spec.dtype} values", "uint8 images", "say in a recipe how they are scaled (data.preprocess)"
        )
    store = ImageStore(paths, spec, preprocess.get(spec.name))
    check_shape(store.read(np.arange(1))[spec.name].shape, spec, str(folder))
    return Data(store, labels, origin=str(folder))


class ImageStore:
    """Image files, decoded as RGB (samples, height, width, 3) before preprocessing."""

    def __init__(self, paths: list[Path], spec: InputLike, preprocess: Preprocess | None) -> None:
        self._paths, self._spec, self._preprocess = paths, spec, preprocess
        channels_last = preprocess is None or preprocess.layout is None
        height, width = spec.shape[1:3] if channels_last else spec.shape[2:4]
        if not isinstance(height, int) or not isinstance(width, int):
            raise DataError(spec.name, "a fixed image size", f"{height}×{width}", "give the input's shape in numbers")
        self._size = (height, width)

    def __len__(self) -> int:
        return len(self._paths)

    def read(self, index: np.ndarray) -> dict[str, np.ndarray]:
        x = np.stack([self._decode(self._paths[i]) for i in index])
        if self._preprocess is not None:
            x = self._preprocess(x, self._spec.name)
        return {self._spec.name: x.astype(self._spec.dtype, copy=False)}

    def _decode(self, path: Path) -> np.ndarray:
        from PIL import Image, UnidentifiedImageError

        height, width = self._size
        try:
            with Image.open(path) as opened:
                image = opened.convert("RGB")
        except (UnidentifiedImageError, OSError) as e:
            raise DataError(path, "a readable image", str(e)) from e
        resize = self._preprocess.resize if self._preprocess else None
        scale = (resize or max(height, width)) / min(image.size)
        if resize or image.width < width or image.height < height:
            image = image.resize(
                (max(width, round(image.width * scale)), max(height, round(image.height * scale))),
                Image.Resampling.BILINEAR,
            )
        left, top = (image.width - width) // 2, (image.height - height) // 2
        return np.asarray(image.crop((left, top, left + width, top + height)))

    def digest(self) -> str:
        steps = None if self._preprocess is None else self._preprocess.as_dict()
        return sha256_json(
            {"files": [sha256_file(p) for p in self._paths], "preprocess": steps, "size": list(self._size)}
        )
