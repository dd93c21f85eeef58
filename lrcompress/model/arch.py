"""Architectures as code the user names: `pkg.mod:callable` or `path/file.py:callable`, returning an `nn.Module`.

A checkpoint that names its architecture is data from somewhere: `rebuild` runs only a file that lies outside of it
and has not changed, or a function of an installed package that is no part of Python or torch.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn

from ..errors import ModelError
from ..files import sha256_bytes, sha256_file

_FORM = "pkg.mod:callable or path/file.py:callable"
#: Packages full of functions that act on the machine; a checkpoint may not name them as its architecture.
_NEVER = frozenset(sys.stdlib_module_names) | {
    "torch",
    "numpy",
    "scipy",
    "pip",
    "setuptools",
    "click",
    "lrcompress",
    "pytest",
    "_pytest",
}


def build(spec: str, args: Mapping[str, Any] | None = None) -> tuple[nn.Module, dict[str, Any]]:
    """Call the architecture that a user named; return its module and `{"spec", "args", "digest"}`."""
    head, name = _split(spec)
    module, source = _load_file(Path(head), spec) if head.endswith(".py") else _import(head, spec)
    factory = _factory(module, name, spec)
    return _call(factory, dict(args or {}), spec), {
        "spec": spec,
        "args": dict(args or {}),
        "digest": _digest(head, source),
    }


def describe_arch(arch: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Return `arch` for a checkpoint in `folder`; a file's path also relative to it, so that both can move together."""
    head, name = _split(arch["spec"])
    found = {"spec": arch["spec"], "args": dict(arch["args"]), "digest": arch["digest"]}
    if head.endswith(".py"):
        found["relative"] = f"{os.path.relpath(Path(head).resolve(), folder.resolve())}:{name}"
    return found


def rebuild(found: Mapping[str, Any], folder: Path) -> tuple[nn.Module, dict[str, Any]]:
    """Call the architecture that the checkpoint in `folder` names, if it is the same code as then."""
    try:
        spec, args, recorded = str(found["spec"]), dict(found["args"]), str(found["digest"])
    except (KeyError, TypeError, ValueError) as e:
        raise ModelError(folder, "an architecture {spec, args, digest}", found, "factorize again") from e
    head, name = _split(spec)
    if head.endswith(".py"):
        spec = _find_file(found, folder, recorded)
    elif head.partition(".")[0] in _NEVER:
        raise ModelError(folder, "an architecture from a model's own package", spec, "do not use this checkpoint")
    else:
        module, source = _import(head, spec)
        if _digest(head, source) != recorded:
            raise _changed(spec, recorded)
        factory = _factory(module, name, spec)
        home = getattr(factory, "__module__", None) or ""
        if home.partition(".")[0] in _NEVER or not (inspect.isfunction(factory) or inspect.isclass(factory)):
            raise ModelError(
                folder, "an architecture from a model's own package", f"{home}.{name}", "do not use this checkpoint"
            )
    network, arch = build(spec, args)
    return network, arch


def _find_file(found: Mapping[str, Any], folder: Path, recorded: str) -> str:
    """Return the spec whose file still has the recorded digest: beside the checkpoint first, then as typed."""
    changed = None
    for spec in (str(found.get("relative", "")), str(found["spec"])):
        if not spec:
            continue
        head, name = _split(spec)
        path = (folder / head if spec == found.get("relative") else Path(head)).resolve()
        if not path.is_file():
            continue
        if path.is_relative_to(folder.resolve()):
            raise ModelError(
                folder,
                "an architecture file outside the checkpoint",
                head,
                "a checkpoint must not bring code: move the file out",
            )
        if sha256_file(path) == recorded:
            return f"{path}:{name}"
        changed = path
    if changed is not None:
        raise _changed(changed, recorded)
    raise ModelError(
        folder,
        f"the architecture file {found['spec']}",
        "no such file",
        "put it back: a checkpoint holds no code, and needs that file beside it",
    )


def _changed(where: object, recorded: str) -> ModelError:
    return ModelError(
        where,
        f"the architecture with digest {recorded[:12]}",
        "another source",
        "restore it as it was, or factorize the model again",
    )


def _split(spec: str) -> tuple[str, str]:
    head, colon, name = spec.rpartition(":")
    if not colon or not head or not name.isidentifier():
        raise ModelError(f"--arch {spec}", _FORM, repr(spec))
    return head, name


def _load_file(path: Path, spec: str) -> tuple[ModuleType, Path]:
    if not path.is_file():
        raise ModelError(f"--arch {spec}", "a Python file", "no such file", "check the path")
    key = f"_lrcompress_arch_{sha256_bytes(os.fsencode(path.resolve()))[:16]}"
    found = importlib.util.spec_from_file_location(key, path)
    assert found is not None and found.loader is not None
    module = importlib.util.module_from_spec(found)
    sys.modules[key] = module  # dataclasses and pickles look their module up there
    try:
        with _reachable(path.resolve().parent):
            found.loader.exec_module(module)
    except Exception as e:  # the user's code may raise anything
        del sys.modules[key]
        raise ModelError(
            f"--arch {spec}",
            "a file that can be imported",
            f"{type(e).__name__}: {e}",
            "run it with Python to see more",
        ) from e
    return module, path


def _import(head: str, spec: str) -> tuple[ModuleType, Path | None]:
    try:
        with _reachable(Path.cwd()):
            module = importlib.import_module(head)
    except Exception as e:  # the same
        got = f"{type(e).__name__}: {e}"
        raise ModelError(
            f"--arch {spec}", "a module that can be imported", got, f"install it, or name a file: {_FORM}"
        ) from e
    file = getattr(module, "__file__", None)
    return module, Path(file) if file else None


@contextmanager
def _reachable(folder: Path) -> Iterator[None]:
    """Let imports find modules in `folder`, after everything that is installed."""
    entry = str(folder)
    sys.path.append(entry)
    try:
        yield
    finally:
        sys.path.reverse()
        sys.path.remove(entry)
        sys.path.reverse()


def _factory(module: ModuleType, name: str, spec: str) -> Callable[..., Any]:
    factory: Callable[..., Any] | None = getattr(module, name, None)
    if not callable(factory):
        known = sorted(
            n
            for n, v in vars(module).items()
            if callable(v) and not n.startswith("_") and v.__module__ == module.__name__
        )
        got = "nothing of that name" if factory is None else f"a {type(factory).__name__}"
        raise ModelError(
            f"--arch {spec}", f"a callable {name!r}", got, f"it offers {', '.join(known[:8])}" if known else ""
        )
    return factory


def _call(factory: Callable[..., Any], args: dict[str, Any], spec: str) -> nn.Module:
    try:
        network = factory(**args)
    except Exception as e:  # the same
        raise ModelError(
            f"--arch {spec}", "a callable that returns an nn.Module", f"{type(e).__name__}: {e}", "check --arch-arg"
        ) from e
    if not isinstance(network, nn.Module):
        raise ModelError(f"--arch {spec}", "a callable that returns an nn.Module", f"a {type(network).__name__}")
    return network


def _digest(head: str, source: Path | None) -> str:
    return sha256_file(source) if source is not None and source.is_file() else sha256_bytes(head.encode())
