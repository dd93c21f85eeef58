"""Open any model: what it is is told by its content, never by its name; nothing in it runs unless it is trusted."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import CommandError, ModelError
from ..files import made_by
from ..graphs.sniffing import looks_like_onnx
from . import arch as architectures
from . import archive
from .huggingface import is_folder, open_folder
from .inputs import InputSpec
from .opened import OpenedModel
from .pickles import load_pickle
from .programs import open_program
from .state_dicts import is_safetensors
from .stored import of_loaded, open_index, open_stored
from .tensors import check_finite, check_floating, check_present, digest_tensors, examine, load_strictly
from .torchscript import convert, open_torchscript

TAKEN = (
    "a Hugging Face folder, a torch.export program (.pt2), a state dict (.pt, .pth, .bin, .safetensors, "
    "or the index of its shards), or with --trust-pickle a pickled module or TorchScript"
)
_KNOWN_HEADS = (
    (b"\x89HDF", "an HDF5 file (Keras)"),
    (b"GGUF", "a GGUF file"),
    (b"PAR1", "a Parquet file"),
    (b"\x93NUMPY", "a NumPy array"),
    (b"\x1f\x8b", "a gzip file"),
    (b"ustar", "a tar file"),
    (b"%PDF", "a PDF"),
    (b"\x7fELF", "a program"),
    (b"\x89PNG", "a picture"),
    (b"version https://git-lfs", "a Git LFS pointer"),
)


def open_model(
    source: str | Path | nn.Module,
    *,
    arch: str | None = None,
    arch_args: Mapping[str, Any] | None = None,
    inputs: Sequence[InputSpec] = (),
    trust_pickle: bool = False,
    trust_remote_code: bool = False,
) -> OpenedModel:
    """Open a model in eval mode; `inputs` take the place of what the source itself tells about them.

    `arch` makes a network of a state dict. `trust_pickle` lets a pickle, `trust_remote_code` a folder's own code run.
    Raises `ModelError` in one line for anything that is no model, is damaged, not finite, or would run code.
    """
    if isinstance(source, nn.Module):
        opened = (
            _from_object(source)
            if not isinstance(source, torch.jit.ScriptModule)
            else convert(source, inputs, "the model")
        )
    else:
        path = Path(source)
        if not path.exists():
            raise ModelError(path, "a model", "no such file or folder", f"give {TAKEN}")
        opened = _from_folder(path, trust_remote_code) if path.is_dir() else _from_file(path, trust_pickle, inputs)
    if arch is not None:
        opened = _with_arch(opened, arch, arch_args)
    elif arch_args:
        raise CommandError("--arch-arg", "an --arch that takes it", ", ".join(arch_args))
    if inputs and opened.kind != "torchscript":  # those are in the order of forward already
        opened.inputs = tuple(inputs)
    return opened


def _from_object(module: nn.Module) -> OpenedModel:
    """Take a live module as it is; it is put in eval mode, nothing else about it changes."""
    tensors = {k: v for k, v in module.state_dict().items() if isinstance(v, Tensor)}
    check_present(tensors, type(module).__name__)
    check_finite(tensors, type(module).__name__)
    check_floating(tensors, type(module).__name__)
    return OpenedModel(None, "module", digest_tensors(tensors), module.eval())


def _with_arch(opened: OpenedModel, spec: str, args: Mapping[str, Any] | None) -> OpenedModel:
    if opened.kind not in ("state_dict", "module"):
        raise ModelError(
            opened.path or "the model",
            "a state dict for --arch",
            f"a {opened.kind}, which is a network already",
            "leave --arch out",
        )
    module, arch = architectures.build(spec, args)
    tensors = opened.tensors
    if tensors is None:
        assert opened.module is not None
        # A live module with the name of its factory: the factory must fit it, so that a checkpoint can be rebuilt.
        load_strictly(module, opened.module.state_dict(), "the module", f"--arch {spec}")
        opened.arch = arch
        return opened
    load_strictly(module, tensors, opened.path, f"--arch {spec}")
    return OpenedModel(opened.path, "module", opened.digest, module.eval(), inputs=opened.inputs, arch=arch)


def _from_folder(folder: Path, trust_remote_code: bool) -> OpenedModel:
    maker = made_by(folder, "lrcompress.json") or made_by(folder, "manifest.json")
    if maker is not None:
        raise ModelError(
            folder, "a model that is not compressed yet", f"a folder made by '{maker}'", "give the original model"
        )
    if is_folder(folder):
        return open_folder(folder, trust_remote_code=trust_remote_code)
    indices = sorted(folder.glob("*.index.json"))
    if len(indices) == 1:
        return _from_tensors(open_index(indices[0]), folder)
    inside = sorted(p.name for p in folder.iterdir())
    got = f"a folder with {', '.join(inside[:4])}{', …' if len(inside) > 4 else ''}" if inside else "an empty folder"
    raise ModelError(folder, "a folder with config.json and weights", got, f"give {TAKEN}")


def _from_file(path: Path, trust_pickle: bool, inputs: Sequence[InputSpec]) -> OpenedModel:
    try:
        with path.open("rb") as f:
            head = f.read(1024)
    except OSError as e:
        raise ModelError(path, "a file that can be read", e.strerror or e, "check its permissions") from e
    if not head:
        raise ModelError(path, "a model", "an empty file", "fetch it again")
    if zipfile.is_zipfile(path):
        return _from_zip(path, trust_pickle, inputs)
    if head[:2] == b"PK":
        raise ModelError(path, "a whole torch file", "a zip whose end is missing", "the file is cut: fetch it again")
    if is_safetensors(path):
        return _from_tensors(open_stored(path), path)
    if head[:1] == b"{" and _is_index(path):
        return _from_tensors(open_index(path), path)
    if head[:1] == b"\x80":
        return _from_pickled(load_pickle(path, trust=trust_pickle), path, trusted=trust_pickle)
    raise ModelError(path, "a model", _foreign(head), f"give {TAKEN}")


def _from_zip(path: Path, trust_pickle: bool, inputs: Sequence[InputSpec]) -> OpenedModel:
    try:
        with zipfile.ZipFile(path) as z:
            names = z.namelist()
    except zipfile.BadZipFile as e:
        raise ModelError(path, "a whole torch file", f"a damaged zip ({e})", "fetch it again") from e
    if archive.is_program(names):
        return open_program(path, trust_pickle=trust_pickle)
    tops = {n.partition("/")[2] for n in names}
    if "constants.pkl" in tops or any(n.startswith("code/") for n in tops):
        if trust_pickle:
            return open_torchscript(path, inputs)
        raise ModelError(
            path,
            TAKEN,
            "a TorchScript archive, which runs code when it is opened",
            "export it with torch.export, give its state dict, or --trust-pickle if you trust where it comes from",
        )
    if "data.pkl" not in tops:
        got = f"a zip with {', '.join(names[:3])}{', …' if len(names) > 3 else ''}" if names else "an empty zip"
        raise ModelError(path, "a model", got, f"give {TAKEN}")
    return _from_pickled(load_pickle(path, trust=trust_pickle), path, trusted=trust_pickle)


def _from_pickled(obj: Any, path: Path, *, trusted: bool) -> OpenedModel:
    if isinstance(obj, nn.Module) and not isinstance(obj, torch.jit.ScriptModule):
        opened = _from_object(obj)
        opened.path, opened.kind = path, "pickled_module"
        return opened
    return _from_tensors(of_loaded(path, obj, trusted=trusted), path)


def _from_tensors(tensors: Mapping[str, Tensor], path: Path) -> OpenedModel:
    check_floating(tensors, path)
    return OpenedModel(path, "state_dict", examine(tensors, path), None, tensors)


def _is_index(path: Path) -> bool:
    try:
        return isinstance(json.loads(path.read_bytes()).get("weight_map"), dict)
    except (ValueError, AttributeError, RecursionError):
        return False


def _foreign(head: bytes) -> str:
    """Say what a file is that is none of ours."""
    if head[4:8] == b"TFL3":
        return "a TensorFlow Lite file"
    if head[257:262] == b"ustar":
        return "a tar file"
    for magic, name in _KNOWN_HEADS:
        if head.startswith(magic):
            return name
    if looks_like_onnx(head):
        return "an ONNX file, which only 'lrcompress factorize' takes, in its own graph"
    try:
        head[:1020].decode()
    except UnicodeDecodeError:
        return "bytes of no format known here"
    return "a text file"
