"""What a compressed checkpoint keeps of the model it came from, and how that is made into a network again."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import ModelError
from ..files import write_atomic
from . import arch as architectures
from . import huggingface, programs
from .inputs import input_from_dict
from .opened import KINDS, OpenedModel

#: What a checkpoint calls a module that was given in memory, without the code that makes it.
OBJECT = "object"
_PROGRAMS = ("pt2", "torchscript")
#: What says whose a model is and what it is for, by file name. A README is a model card in a Hugging Face folder only.
_NOTICE = re.compile(r"(LICEN[CS]E|NOTICE|COPYING|MODEL_CARD)([._-][A-Za-z0-9._-]{1,40})?", re.IGNORECASE)
_MAX_NOTICE_BYTES = 1 << 20


def describe(opened: OpenedModel, folder: Path) -> dict[str, Any]:
    """Return JSON that `skeleton` reads; put into `folder` what else it needs: a configuration, a weightless graph.

    A module that came from memory or a pickle is recorded as it is, though it cannot be rebuilt.
    """
    found: dict[str, Any] = {
        "kind": OBJECT if opened.kind == "module" and opened.arch is None else opened.kind,
        "inputs": [s.as_dict() for s in opened.inputs],
        "arch": None if opened.arch is None else architectures.describe_arch(opened.arch, folder),
    }
    if opened.kind == "huggingface":
        source = Path(opened.extra["folder"])
        found["files"] = huggingface.copy_config(source, folder)
        found["extra"] = {k: v for k, v in opened.extra.items() if k != "folder"}
    if opened.kind in _PROGRAMS and "graph" in opened.extra:
        write_atomic(folder / programs.GRAPH, opened.extra["graph"])
        found["files"] = [programs.GRAPH]
    notices = copy_notices(_source_folder(opened), folder, card=opened.kind == "huggingface")
    if notices:
        found["files"] = [*found.get("files", []), *notices]
    return found


def copy_notices(source: Path | None, folder: Path, *, card: bool) -> list[str]:
    """Copy licences, and with `card` the README too, byte for byte; return the names."""
    if source is None or not source.is_dir():
        return []
    names = [p.name for p in sorted(source.iterdir()) if _NOTICE.fullmatch(p.name) or (card and p.name == "README.md")]
    found = []
    for name in names:
        path = source / name
        if path.is_file() and path.stat().st_size <= _MAX_NOTICE_BYTES:
            write_atomic(folder / name, path.read_bytes())
            found.append(name)
    return found


def _source_folder(opened: OpenedModel) -> Path | None:
    """Return the folder that a model's files lie in; None for one from memory."""
    if "folder" in opened.extra:
        return Path(opened.extra["folder"])
    return None if opened.path is None else Path(opened.path).parent


def skeleton(spec: Mapping[str, Any], folder: Path) -> OpenedModel:
    """Build the network that `describe` recorded, before compression and without its weights.

    Raises `ModelError` where that is impossible: code that changed or is gone, a module that came from memory.
    """
    kind = spec.get("kind") if isinstance(spec, Mapping) else None
    if kind not in (*KINDS, OBJECT) or not isinstance(spec.get("inputs"), list):
        raise ModelError(folder, f"a model of kind {', '.join(KINDS)} and its inputs", kind, "factorize again")
    inputs = tuple(input_from_dict(i, folder) for i in spec["inputs"])
    if kind == "state_dict":
        return OpenedModel(None, kind, "", None, {}, inputs)
    if kind == "huggingface":
        if (spec.get("extra") or {}).get("remote_code"):
            got = "one that needs code from its original folder"
            raise ModelError(
                folder,
                "a network that can be built without foreign code",
                got,
                "use a class of transformers, or --arch",
            )
        opened = huggingface.rebuild_folder(folder)
    elif kind in _PROGRAMS and (folder / programs.GRAPH).is_file():
        opened = programs.open_graph(folder / programs.GRAPH)
        opened.kind = kind
    elif spec.get("arch"):
        module, arch = architectures.rebuild(spec["arch"], folder)
        opened = OpenedModel(None, kind, "", module.eval(), arch=arch)
    else:
        got = {"pt2": "a program that was opened with --trust-pickle"}.get(
            kind, "a module that came from memory or a pickle"
        )
        remedy = "factorize again with --arch pkg.mod:callable, or from a .pt2 that torch.export wrote"
        raise ModelError(folder, "a model that can be built again", got, remedy)
    opened.inputs = inputs or opened.inputs
    return opened
