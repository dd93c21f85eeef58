"""Named tensors that stay in their files until they are asked for, one at a time.

    tensors = StoredTensors([StoredFile.open(path)])
    tensors.described()["fc.weight"].shape    # dtype and shape, on the meta device: nothing is read
    w = tensors.read("fc.weight")             # memory of its own, which leaves with it
    tensors["fc.weight"]                      # mapped: pages come as they are touched, and stay while it lives

A reference names one tensor of one file and can travel to another process; a file that changed since it was opened is
refused there as here.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import LrcompressWarning, ModelError
from .pickles import load_pickle
from .state_dicts import clean_state_dict, is_safetensors

#: The types of safetensors that torch has under one name each; any other is read by the library's own mapping.
_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
#: A mapped pickle is mapped anew after so many bytes, so that the pages of tensors that are gone go too.
_RENEW_BYTES = 32_000_000
_Stamp = tuple[int, int, int]


@dataclass(frozen=True)
class Reference:
    """One tensor of one file, as a layer has it: `transposed` first, then with another dtype."""

    path: Path
    name: str
    stamp: _Stamp
    transposed: bool = False
    dtype: torch.dtype | None = None

    def read(self) -> Tensor:
        """Return the tensor in memory of its own. Raises `ModelError` if the file is not the one that was opened."""
        value = StoredFile.open(self.path, stamp=self.stamp).read(self.name)
        value = value if self.dtype is None else value.to(self.dtype)
        return value.T.contiguous() if self.transposed else value


class StoredFile:
    """One weight file: the dtype and shape of its tensors, and each of them when it is asked for."""

    def __init__(self, path: Path, stamp: _Stamp, described: dict[str, Tensor]) -> None:
        self.path, self.stamp, self.described = path, stamp, described

    @classmethod
    def open(cls, path: Path, *, stamp: _Stamp | None = None) -> StoredFile:
        """Open a file by what its bytes are; with `stamp`, only if it is still the file of that stamp."""
        now = _stamp(path)
        if stamp is not None and now != stamp:
            raise _changed(path)
        if is_safetensors(path):
            return _Safetensors(path, now)
        said = warnings.catch_warnings() if stamp is not None else None  # what was stripped was said the first time
        if said is None:
            return _Pickled(path, now)
        with said:
            warnings.simplefilter("ignore", LrcompressWarning)
            return _Pickled(path, now)

    def mapped(self) -> dict[str, Tensor]:
        """Return all tensors as views of the mapped file."""
        raise NotImplementedError

    def read(self, name: str) -> Tensor:
        """Return one tensor in memory that leaves with it."""
        raise NotImplementedError

    def reference(self, name: str) -> Reference | None:
        """Return what another process can read the tensor by; None where it would have to read all others too."""
        return Reference(self.path.resolve(), name, self.stamp)

    def check(self) -> None:
        """Raise `ModelError` if the file changed since it was opened."""
        if _stamp(self.path) != self.stamp:
            raise _changed(self.path)


class _Safetensors(StoredFile):
    def __init__(self, path: Path, stamp: _Stamp) -> None:
        with _damage(path):
            # The library checks the header in full; what it does not tell is where each tensor lies.
            with safe_open(path, framework="np") as f:
                names = list(f.keys())
            with path.open("rb") as file:
                size = int.from_bytes(file.read(8), "little")
                header: dict[str, Any] = json.loads(file.read(size))
            described, self._where = {}, {}
            for name in names:
                entry = header[name]
                dtype = _DTYPES.get(entry["dtype"])
                begin, end = entry["data_offsets"]
                if dtype is None:
                    with safe_open(path, framework="pt") as f:
                        dtype = f.get_tensor(name).dtype
                else:
                    self._where[name] = (8 + size + begin, end - begin)
                described[name] = torch.empty(entry["shape"], dtype=dtype, device="meta")
        super().__init__(path, stamp, described)

    def mapped(self) -> dict[str, Tensor]:
        with _damage(self.path), safe_open(self.path, framework="pt", device="cpu") as f:
            return {name: f.get_tensor(name) for name in self.described}

    def read(self, name: str) -> Tensor:
        self.check()
        about = self.described[name]
        if name not in self._where:
            with _damage(self.path), safe_open(self.path, framework="pt", device="cpu") as f:
                return f.get_tensor(name).clone()  # type: ignore[no-any-return]
        at, size = self._where[name]
        value = torch.empty(size, dtype=torch.uint8)
        with self.path.open("rb", buffering=0) as file:
            file.seek(at)
            buffer, done = value.numpy().data, 0
            while done < size:
                n = file.readinto(buffer[done:])
                if not n:
                    raise _changed(self.path)
                done += n
        return value.view(about.dtype).reshape(about.shape)


class _Pickled(StoredFile):
    def __init__(self, path: Path, stamp: _Stamp, loaded: Any = None, *, resident: bool = False) -> None:
        obj = load_pickle(path) if loaded is None else loaded
        self._tensors: dict[str, Tensor] | None = clean_state_dict(obj, path)
        self._handed_bytes = 0
        super().__init__(path, stamp, _described(self._tensors))
        # The older format of torch.save cannot be mapped: its tensors are in memory already.
        self._resident = resident or not _is_zip(path)

    def mapped(self) -> dict[str, Tensor]:
        return dict(self._now())

    def read(self, name: str) -> Tensor:
        """Return one tensor; of a mapped file, through a mapping that is renewed before it has grown large."""
        self.check()
        size = self.described[name].nbytes
        if not self._resident and self._handed_bytes and self._handed_bytes + size > _RENEW_BYTES:
            self._tensors, self._handed_bytes = None, 0
        self._handed_bytes += size
        return self._now()[name]

    def reference(self, name: str) -> Reference | None:
        return None if self._resident else super().reference(name)

    def _now(self) -> dict[str, Tensor]:
        if self._tensors is None:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", LrcompressWarning)  # what was stripped was said the first time
                self._tensors = clean_state_dict(load_pickle(self.path), self.path)
        return self._tensors


class _Held(StoredFile):
    """Tensors that are in memory, as if they were a file."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = dict(tensors)
        super().__init__(Path(), (0, 0, 0), _described(self._tensors))

    def mapped(self) -> dict[str, Tensor]:
        return dict(self._tensors)

    def read(self, name: str) -> Tensor:
        return self._tensors[name]

    def reference(self, name: str) -> Reference | None:
        return None


class Piece(NamedTuple):
    """A tensor of a stored file under a name of its own."""

    file: StoredFile
    name: str


class StoredTensors(Mapping[str, Tensor]):
    """The tensors of one or several files by name; `pieces` says which tensor of which file each is."""

    def __init__(self, files: Iterable[StoredFile] = (), pieces: Mapping[str, Piece] | None = None) -> None:
        self.pieces = dict(pieces or {name: Piece(file, name) for file in files for name in file.described})
        self._mapped: dict[int, dict[str, Tensor]] = {}

    def __len__(self) -> int:
        return len(self.pieces)

    def __iter__(self) -> Iterator[str]:
        return iter(self.pieces)

    def __contains__(self, name: object) -> bool:
        return name in self.pieces

    def __getitem__(self, name: str) -> Tensor:
        file, inner = self.pieces[name]
        if id(file) not in self._mapped:
            self._mapped[id(file)] = file.mapped()
        return self._mapped[id(file)][inner]

    def read(self, name: str) -> Tensor:
        """Return one tensor in memory that leaves with it."""
        file, inner = self.pieces[name]
        return file.read(inner)

    def described(self) -> dict[str, Tensor]:
        """Return dtypes and shapes as tensors on the meta device, tied tensors as the same object."""
        return {name: file.described[inner] for name, (file, inner) in self.pieces.items()}

    def reference(self, name: str) -> Reference | None:
        """Return what another process can read a tensor by; None where it would have to read all others too."""
        file, inner = self.pieces[name]
        return file.reference(inner)


def held(tensors: Mapping[str, Tensor]) -> StoredTensors:
    """Return stored tensors as they are, and those of a dict as if they were stored."""
    return tensors if isinstance(tensors, StoredTensors) else StoredTensors([_Held(tensors)])


def described(tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Return something with the dtypes and shapes of `tensors`, without reading what is stored."""
    return tensors.described() if isinstance(tensors, StoredTensors) else tensors


def reader(tensors: Mapping[str, Tensor]) -> Callable[[str], Tensor]:
    """Return what gives one tensor by name for a moment: of stored ones, memory that leaves with it."""
    return tensors.read if isinstance(tensors, StoredTensors) else tensors.__getitem__


def open_stored(path: Path) -> StoredTensors:
    """Open one weight file; `ModelError` if it is damaged or holds no tensors."""
    return StoredTensors([StoredFile.open(path)])


def of_loaded(path: Path, obj: Any, *, trusted: bool) -> StoredTensors:
    """Return the tensors of a pickle that was just loaded; one that had to be trusted is not loaded a second time."""
    return StoredTensors([_Pickled(path, _stamp(path), obj, resident=trusted)])


def open_index(path: Path) -> StoredTensors:
    """Open the shards that an index file names beside it; `ModelError` where they are not what it promises."""
    try:
        weight_map = json.loads(path.read_text())["weight_map"]
        wanted = {str(name): str(shard) for name, shard in weight_map.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
        raise ModelError(path, "an index with a weight_map", f"{type(e).__name__}: {e}", "fetch it again") from e
    if not wanted:
        raise ModelError(path, "an index with a weight_map", "an empty one", "fetch it again")
    files: dict[str, StoredFile] = {}
    for shard in sorted(set(wanted.values())):
        if Path(shard).name != shard:
            raise ModelError(path, "shards beside the index", shard, "do not use this file")
        if not (path.parent / shard).is_file():
            raise ModelError(path, f"the shard {shard} beside it", "no such file", "fetch all shards")
        files[shard] = StoredFile.open(path.parent / shard)
    pieces: dict[str, Piece] = {}
    for name, shard in sorted(wanted.items(), key=lambda item: item[1]):
        if name not in files[shard].described:
            expected = f"the tensor {name} that the index promises"
            raise ModelError(path.parent / shard, expected, "none of that name", "fetch all shards again")
        pieces[name] = Piece(files[shard], name)
    return StoredTensors(pieces=pieces)


def _described(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors on the meta device; names of one tensor share one."""
    seen: dict[object, Tensor] = {}
    out = {}
    for name, value in tensors.items():
        key: object = (value.data_ptr(), tuple(value.shape), value.stride(), value.dtype)
        if value.is_meta or not value.numel():
            key = name
        # A view of a larger tensor has strides; a bare one keeps them so that it can be recognised.
        out[name] = seen.setdefault(
            key, torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")
        )
    return out


def _is_zip(path: Path) -> bool:
    with path.open("rb") as f:
        return f.read(2) == b"PK"


def _stamp(path: Path) -> _Stamp:
    try:
        found = path.stat()
    except OSError as e:
        raise ModelError(path, "a file that can be read", e.strerror or str(e), "check that it is still there") from e
    return found.st_ino, found.st_size, found.st_mtime_ns


def _changed(path: Path) -> ModelError:
    return ModelError(
        path, "the file as it was when it was opened", "another one", "let nothing write to it, and start again"
    )


class _damage:
    """Turn what the library says of a damaged file into one line."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, SafetensorError | RuntimeError | ValueError | KeyError):
            remedy = "the file is cut or damaged: fetch it again"
            raise ModelError(self._path, "a whole safetensors file", str(error), remedy) from error
