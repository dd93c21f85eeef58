"""Statistics as a folder: one safetensors file per distinct input and per layer's output, and a record of all hashes.

    statistics.json          {made_by, schema, model, about, layers {name: …}, files {name: {sha256, bytes}}}
    input-0003.safetensors   gram, mean — or row_weights, of an embedding
    output-0007.safetensors  output_gram

What is read back is the same numbers bit for bit, mapped from the files: pages come into memory when they are used,
and layers that read one input get one tensor. Every file is hashed before any is used.

    write_statistics("kept", statistics, model=opened.digest, layers=layers)
    statistics = read_statistics("kept", model=opened.digest, layers=layers)
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..errors import DataError
from ..factorize import Statistics
from ..files import made_by, sha256_file, staged_folder, write_json
from ..model.surgery import Layer

MAKER = "lrcompress statistics"
MARKER = "statistics.json"
SCHEMA = 1
_FILE = re.compile(r"(input|output)-\d{4,}\.safetensors")
_TENSORS = {"input": ("gram", "mean", "row_weights"), "output": ("output_gram",)}


def is_statistics(path: str | Path) -> bool:
    """Return whether `path` is a folder that `write_statistics` made."""
    return made_by(Path(path), MARKER) == MAKER


def write_statistics(
    folder: str | Path,
    statistics: Mapping[str, Statistics],
    *,
    model: str,
    layers: Sequence[Layer],
    about: Mapping[str, Any] | None = None,
) -> None:
    """Write the statistics of `layers` of the model with digest `model`; `about`: what else the record should say."""
    with staged_folder(Path(folder), maker=MAKER, marker=MARKER) as stage:
        names: dict[tuple[int, ...], str] = {}
        rows: dict[str, dict[str, Any]] = {}
        for layer in layers:
            found = statistics[layer.name]
            row = {"kind": layer.kind, "shape": list(layer.shape), "count": found.count, "positions": found.positions}
            rows[layer.name] = {**row, "groups": found.groups}
            for part, wanted in _TENSORS.items():
                tensors = {n: t for n in wanted if (t := getattr(found, n)) is not None}
                if tensors:
                    identity = tuple(map(id, tensors.values()))
                    if identity not in names:
                        names[identity] = f"{part}-{len(names):04}.safetensors"
                        save_file({n: t.contiguous() for n, t in tensors.items()}, stage / names[identity])
                    rows[layer.name][part] = names[identity]
        files = {n: {"sha256": sha256_file(stage / n), "bytes": (stage / n).stat().st_size} for n in names.values()}
        record = {"made_by": MAKER, "schema": SCHEMA, "model": model, "about": dict(about or {})}
        write_json(stage / MARKER, {**record, "layers": rows, "files": files})


def read_statistics(
    folder: str | Path, *, model: str, layers: Sequence[Layer], hashed: bool = False
) -> dict[str, Statistics]:
    """Return the statistics of `layers`, mapped from the files; `hashed`: this process just wrote them.

    Raises `DataError`: no such folder, statistics of another model, a layer that they lack or that has another shape,
    a damaged file.
    """
    folder = Path(folder)
    record = _record(folder)
    if record["model"] != model:
        raise DataError(
            folder, f"statistics of this model ({model[:12]}…)", f"statistics of another model ({str(record['model'])[:12]}…)",
            "give the data instead, or the model that they were collected from",
        )  # fmt: skip
    for layer in layers:
        row = record["layers"].get(layer.name)
        if row is None:
            raise DataError(
                f"{folder}: {layer.name}",
                "statistics of every layer",
                "none of this one",
                "collect them again, with it",
            )
        if tuple(row["shape"]) != tuple(layer.shape):
            raise DataError(f"{folder}: {layer.name}", f"a layer {tuple(layer.shape)}", tuple(row["shape"]))
    files = _Files(folder, record["files"])
    if not hashed:
        files.check()
    out = {}
    for layer in layers:
        out[layer.name] = found = _statistics(record["layers"][layer.name], files)
        try:
            found.check(layer.weight)
        except ValueError as e:
            raise DataError(f"{folder}: {layer.name}", "moments of this layer", str(e), "collect them again") from e
    return out


def _record(folder: Path) -> dict[str, Any]:
    """Return the record of a folder, its parts of the right kind."""
    path, expected, remedy = folder / MARKER, f"a record that '{MAKER}' wrote", "collect them again"
    try:
        record = json.loads(path.read_text())
    except (OSError, ValueError) as e:
        raise DataError(path, expected, getattr(e, "strerror", None) or "no JSON", remedy) from e
    if not isinstance(record, dict) or record.get("made_by") != MAKER:
        raise DataError(path, expected, "something else", remedy)
    if record.get("schema") != SCHEMA:
        raise DataError(path, f"schema {SCHEMA}", record.get("schema", "none"), remedy)
    if not _is_whole(record):
        raise DataError(path, expected, "a damaged one", remedy)
    return record


def _is_whole(record: dict[str, Any]) -> bool:
    """Return whether the parts of a record are of the right kind, and every file that a layer names is listed."""
    layers, files = record.get("layers"), record.get("files")
    if not isinstance(record.get("model"), str) or not isinstance(layers, dict) or not isinstance(files, dict):
        return False
    if not all(map(_is_row, layers.values())) or not all(map(_FILE.fullmatch, files)):
        return False
    named = {row[part] for row in layers.values() for part in _TENSORS if part in row}
    return named <= set(files) and all(isinstance(f, dict) and {"sha256", "bytes"} <= set(f) for f in files.values())


def _is_row(row: Any) -> bool:
    if not isinstance(row, dict) or not isinstance(row.get("shape"), list):
        return False
    whole = all(
        isinstance(n, int) and not isinstance(n, bool) for n in [*row["shape"], row.get("count"), row.get("groups")]
    )
    return whole and isinstance(row.get("positions"), int | float) and all(
        isinstance(row[part], str) and row[part].startswith(part) for part in _TENSORS if part in row
    )  # fmt: skip


@dataclass
class _Files:
    """The files of a folder, each mapped once."""

    folder: Path
    listed: Mapping[str, Mapping[str, Any]]

    def __post_init__(self) -> None:
        self._tensors: dict[str, dict[str, Tensor]] = {}

    def check(self) -> None:
        """Hash every file before one is used."""
        for name, facts in self.listed.items():
            path = self.folder / name
            try:
                whole = path.stat().st_size == facts["bytes"] and sha256_file(path) == facts["sha256"]
            except OSError as e:
                raise DataError(path, "a file that the record lists", e.strerror, "collect them again") from e
            if not whole:
                raise DataError(path, "the bytes that were written", "other bytes", "collect them again")

    def tensors(self, name: str) -> dict[str, Tensor]:
        """Return the tensors of a file, the same ones every time."""
        if name not in self._tensors:
            try:
                with safe_open(self.folder / name, framework="pt") as f:
                    self._tensors[name] = {key: f.get_tensor(key) for key in f.keys()}  # noqa: SIM118
            except (SafetensorError, OSError) as e:
                raise DataError(self.folder / name, "a whole .safetensors file", str(e), "collect them again") from e
        return self._tensors[name]


def _statistics(row: Mapping[str, Any], files: _Files) -> Statistics:
    tensors = {n: t for part in _TENSORS if part in row for n, t in files.tensors(row[part]).items()}
    known = {n: t for n, t in tensors.items() if n in (*_TENSORS["input"], *_TENSORS["output"])}
    return Statistics(**known, count=row["count"], positions=row["positions"], groups=row["groups"])
