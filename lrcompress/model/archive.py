"""The archive of a `torch.export` program, read and checked as data before torch sees any of it.

Opening a `.pt2` with torch may run code: through pickles, through operator names that lead anywhere below `torch`,
through size expressions that are evaluated, through names that become Python source, through compiled libraries.
Here each part is held to a grammar, and what torch loads is written anew from the parts that passed.
"""

from __future__ import annotations

import ast
import io
import json
import re
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..errors import ModelError
from .pickles import check_pickle

_GRAPH, _WEIGHTS, _CONSTANTS, _SAMPLES = (
    "models/{}.json",
    "data/weights/{}_weights_config.json",
    "data/constants/{}_constants_config.json",
    "data/sample_inputs/{}.pt",
)
_MAX_JSON_BYTES = 256 * 2**20
_NAMESPACES = "aten|prims|quantized_decomposed|torchvision"
_HIGHER_ORDER = "cond|while_loop|scan|map_impl|wrap_with_set_grad_enabled|wrap_with_autocast"
_ARITHMETIC = "add|sub|mul|floordiv|truediv|mod|neg|pow|getitem|eq|ne|lt|le|gt|ge|and_|or_|not_|xor|pos|abs"
_TARGET = re.compile(
    rf"torch\.ops\.({_NAMESPACES})\.(\w+)(\.\w+)?|torch\.ops\.higher_order\.({_HIGHER_ORDER})|torch\.sym_\w+|"
    rf"torch\._check|_operator\.({_ARITHMETIC})|math\.(ceil|floor|trunc|sqrt|pow)"
)
_PLAIN = re.compile(r"[\w.\-]*", re.ASCII)
_CALL = re.compile(
    r"Symbol|Integer|Float|Rational|Mul|Add|Pow|Mod|Max|Min|Abs|FloorDiv|ModularIndexing|Where|PythonMod|"
    r"CleanDiv|CeilToInt|FloorToInt|CeilDiv|LShift|RShift|PowByNatural|FloatPow|FloatTrueDiv|IntTrueDiv|"
    r"TruncToFloat|TruncToInt|RoundToInt|RoundDecimal|ToFloat|Identity|Eq|Ne|Lt|Le|Gt|Ge|Equality|"
    r"Unequality|StrictLessThan|LessThan|StrictGreaterThan|GreaterThan|And|Or|Not|floor|ceiling"
)
_CONSTANT = re.compile(r"[suzf]\d+|true|false|oo|int_oo|nan")
_EXPRESSION_NODES = (
    ast.Expression,
    ast.Call,
    ast.Name,
    ast.Load,
    ast.Constant,
    ast.keyword,
    ast.BinOp,
    ast.UnaryOp,
    ast.Add,
    ast.Sub,
    ast.Mult,
    ast.FloorDiv,
    ast.Div,
    ast.Mod,
    ast.Pow,
    ast.USub,
    ast.Compare,
    ast.Eq,
    ast.NotEq,
    ast.Lt,
    ast.LtE,
    ast.Gt,
    ast.GtE,
)
_CONTAINERS = {"builtins.tuple", "builtins.list", "builtins.dict", "collections.OrderedDict", None}


class Unsafe(ValueError):
    """Something in an archive that could run code, or that this reader does not know to be harmless."""


@dataclass(frozen=True)
class Archive:
    """The checked parts: `graph` is the program, the two tables say which member holds which tensor."""

    path: Path
    graph: dict[str, Any]
    weights: dict[str, Any]
    constants: dict[str, Any]
    members: Mapping[str, str]

    def read(self, folder: str, entry: Mapping[str, Any]) -> bytes:
        """Return the bytes of one tensor's member."""
        with zipfile.ZipFile(self.path) as z:
            return z.read(self.members[f"data/{folder}/{entry['path_name']}"])


def is_program(names: list[str]) -> bool:
    """Say whether the members of a zip are those of a `torch.export` program."""
    return any(n.endswith("/archive_format") for n in names) or "serialized_exported_program.json" in names


def read_archive(path: Path) -> Archive:
    """Read and check an archive; `Unsafe` for what could run code, `ModelError` for what is damaged."""
    try:
        with zipfile.ZipFile(path) as z:
            members = _members(z, path)
            _check_members(z, members, path)
            name = _model_name(members, path)
            graph, weights, constants = (
                _json(z, members, form.format(name), path) for form in (_GRAPH, _WEIGHTS, _CONSTANTS)
            )
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError) as e:
        raise ModelError(path, "a whole .pt2 archive", str(e), "the file is cut or damaged: fetch it again") from e
    archive = Archive(path, _checked_graph(graph), _table(weights, path), _table(constants, path), members)
    for folder, table in (("weights", archive.weights), ("constants", archive.constants)):
        for tensor, entry in table.items():
            if f"data/{folder}/{entry['path_name']}" not in members:
                raise ModelError(path, f"the member of {tensor}", f"no {entry['path_name']}", "fetch it again")
    return archive


def _members(z: zipfile.ZipFile, path: Path) -> dict[str, str]:
    """Return {name without the root folder: name}; one root, no name twice."""
    names = [i.filename for i in z.infolist() if not i.is_dir()]
    if "serialized_exported_program.json" in names:
        raise ModelError(
            path,
            "a .pt2 of torch 2.9 or newer",
            "the older format, which is a pickle",
            "export it again with a current torch",
        )
    roots = {n.partition("/")[0] for n in names}
    if len(roots) != 1 or len(set(names)) != len(names):
        raise Unsafe("an archive with one root folder and no member twice")
    return {n.partition("/")[2]: n for n in names}


def _check_members(z: zipfile.ZipFile, members: Mapping[str, str], path: Path) -> None:
    for name, full in members.items():
        if name.startswith(("data/aotinductor/", "data/executorch/", "data/mtia/")):
            raise Unsafe(f"compiled code ({name})")
        if name.startswith("data/constants/") and name.partition("data/constants/")[2].startswith(
            ("custom_obj", "opaque_obj")
        ):
            raise Unsafe(f"a pickled object ({name})")
        if name.startswith("data/sample_inputs/") or name.endswith((".pkl", ".pickle")):
            if z.getinfo(full).file_size > _MAX_JSON_BYTES:
                raise ModelError(
                    path, "sample inputs of a sensible size", f"{z.getinfo(full).file_size} bytes", "export it again"
                )
            data = z.read(full)
            if data:
                check_pickle(io.BytesIO(data), f"{path}: {name}")


def _model_name(members: Mapping[str, str], path: Path) -> str:
    models = [m[1] for n in members if (m := re.fullmatch(r"models/([\w.\-]+)\.json", n))]
    if len(models) != 1:
        raise ModelError(path, "an archive with one program", f"{len(models)}", "save one program per file")
    return models[0]


def _json(z: zipfile.ZipFile, members: Mapping[str, str], name: str, path: Path) -> dict[str, Any]:
    if name not in members:
        raise ModelError(path, f"the member {name}", "an archive without it", "export it again with a current torch")
    if z.getinfo(members[name]).file_size > _MAX_JSON_BYTES:
        raise ModelError(path, f"a {name} of a sensible size", f"{z.getinfo(members[name]).file_size} bytes")
    try:
        value = json.loads(z.read(members[name]))
    except (ValueError, RecursionError) as e:
        raise ModelError(path, f"JSON in {name}", str(e), "fetch it again") from e
    if not isinstance(value, dict):
        raise ModelError(path, f"a JSON object in {name}", type(value).__name__, "fetch it again")
    return value


def _table(value: dict[str, Any], path: Path) -> dict[str, Any]:
    table = value.get("config")
    if not isinstance(table, dict) or not all(
        isinstance(e, dict) and isinstance(e.get("path_name"), str) for e in table.values()
    ):
        raise ModelError(path, "a table of tensors", "something else", "fetch it again")
    for name, entry in table.items():
        if entry.get("use_pickle") is not False or not isinstance(entry.get("tensor_meta"), dict):
            raise Unsafe(f"a pickled tensor ({name})")
        if not _PLAIN.fullmatch(name) or not re.fullmatch(r"[\w.\-]+", entry["path_name"]):
            raise Unsafe(f"a tensor called {name!r}")
        _check_expressions(entry)
    return table


def _checked_graph(graph: dict[str, Any]) -> dict[str, Any]:
    """Return the program without what only a debugger reads; `Unsafe` names the first thing that is not plain."""
    version = str(graph.get("torch_version", ""))
    graph = {
        **graph,
        "guards_code": [],
        "torch_version": version if re.fullmatch(r"[\w.]*", version.partition("+")[0]) else "",
    }
    graph["torch_version"] = graph["torch_version"].partition("+")[0]
    for holder in list(_dicts(graph)):
        if "target" in holder and "metadata" in holder:
            holder["metadata"] = {}
            _check_target(str(holder["target"]))
    for key in ("in_spec", "out_spec"):
        for holder in list(_dicts(graph)):
            if isinstance(holder.get(key), str) and holder[key]:
                holder[key] = _checked_spec(holder[key])
    _check_expressions(graph)
    _check_strings(graph, "")
    return graph


def _dicts(value: Any) -> Iterator[dict[str, Any]]:
    if isinstance(value, dict):
        yield value
        for item in value.values():
            yield from _dicts(item)
    elif isinstance(value, list):
        for item in value:
            yield from _dicts(item)


def _check_target(target: str) -> None:
    match = _TARGET.fullmatch(target)
    if not match:
        raise Unsafe(f"the operator {target!r}")
    if match[2]:
        packet = getattr(getattr(torch.ops, match[1]), match[2], None)
        if packet is None:
            raise Unsafe(f"the operator {target!r}, which this torch does not have")
        for overload in packet.overloads():
            arguments = getattr(packet, overload)._schema.arguments
            if any("file" in a.name and "str" in str(a.type) for a in arguments):
                raise Unsafe(f"the operator {target!r}, which touches files")


def _check_expressions(value: Any) -> None:
    """Check every `expr_str`: torch hands them to a parser that evaluates Python."""
    for holder in _dicts(value):
        text = holder.get("expr_str")
        if text is None:
            continue
        try:
            tree = ast.parse(text, mode="eval") if isinstance(text, str) and len(text) < 10_000 else None
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            tree = None
        if tree is None or not all(_plain_node(n) for n in ast.walk(tree)):
            raise Unsafe(f"the size expression {str(text)[:80]!r}")


def _plain_node(node: ast.AST) -> bool:
    if not isinstance(node, _EXPRESSION_NODES):
        return False
    if isinstance(node, ast.Call):
        return isinstance(node.func, ast.Name) and _CALL.fullmatch(node.func.id) is not None
    if isinstance(node, ast.Name):
        return (_CALL.fullmatch(node.id) or _CONSTANT.fullmatch(node.id)) is not None
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return re.fullmatch(r"[A-Za-z_]\w*|[-+]?[0-9][0-9.e+\-]*", node.value) is not None and "__" not in node.value
    return not isinstance(node, ast.Constant) or isinstance(node.value, int | float | bool)


def _checked_spec(text: str) -> str:
    """Return a tree spec of plain containers; the dict-like outputs of other libraries become dicts."""
    try:
        protocol, tree = json.loads(text)
    except (ValueError, TypeError, RecursionError) as e:
        raise Unsafe(f"the structure {text[:80]!r}") from e
    return json.dumps([protocol, _checked_tree(tree)])


def _checked_tree(tree: Any) -> dict[str, Any]:
    if (
        not isinstance(tree, dict)
        or set(tree) != {"type", "context", "children_spec"}
        or not isinstance(tree["children_spec"], list)
    ):
        raise Unsafe("a structure that is no tree")
    children = [_checked_tree(c) for c in tree["children_spec"]]
    kind, context = tree["type"], tree["context"]
    if kind not in _CONTAINERS:
        try:
            keys = json.loads(context) if isinstance(context, str) else None
        except ValueError:
            keys = None
        if not isinstance(keys, list) or len(keys) != len(children) or not all(isinstance(k, str) for k in keys):
            raise Unsafe(f"a structure of type {kind!r}")
        kind, context = "builtins.dict", json.dumps(keys)
    if context is not None and "__enum__" in str(context):
        raise Unsafe("a structure with an enumeration")
    return {"type": kind, "context": context, "children_spec": children}


def _check_strings(value: Any, key: str) -> None:
    """Hold every other string to plain characters: many of them become names in generated Python."""
    if isinstance(value, dict):
        for k, item in value.items():
            if not _PLAIN.fullmatch(k):
                raise Unsafe(f"the name {k[:80]!r}")
            if k in ("as_string", "as_strings"):
                continue  # a literal argument, for instance an einsum equation: quoted wherever it is used
            _check_strings(item, k)
    elif isinstance(value, list):
        for item in value:
            _check_strings(item, key)
    elif isinstance(value, str) and key not in ("expr_str", "in_spec", "out_spec") and not _PLAIN.fullmatch(value):
        raise Unsafe(f"the text {value[:80]!r}")


def write_graph(archive: Archive, name: str = "graph") -> bytes:
    """Return an archive with the program and its constants; the weights are there by name and shape, without bytes."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_STORED) as z:

        def put(member: str, data: bytes) -> None:
            z.writestr(zipfile.ZipInfo(f"{name}/{member}", (1980, 1, 1, 0, 0, 0)), data)

        put("archive_format", b"pt2")
        put("archive_version", b"0")
        put("byteorder", b"little")
        put(".data/version", b"3\n")
        put(_GRAPH.format("model"), json.dumps(archive.graph, sort_keys=True).encode())
        for folder, table, form in (
            ("weights", archive.weights, _WEIGHTS),
            ("constants", archive.constants, _CONSTANTS),
        ):
            members, config = _renumbered(table, folder)
            put(form.format("model"), json.dumps({"config": config}, sort_keys=True).encode())
            for member, entry in members.items():
                put(f"data/{folder}/{member}", b"" if folder == "weights" else archive.read(folder, entry))
        put(_SAMPLES.format("model"), b"")
    return out.getvalue()


def _renumbered(table: Mapping[str, Any], folder: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return members and a new table; tensors that are wholly the same stay one, all others have their own member."""
    prefix = "weight_" if folder == "weights" else "tensor_"
    same: dict[str, str] = {}
    members: dict[str, Any] = {}
    config: dict[str, Any] = {}
    for tensor in sorted(table):
        entry = table[tensor]
        key = json.dumps([entry["path_name"], entry["tensor_meta"]], sort_keys=True)
        member = same.setdefault(key, f"{prefix}{len(same)}")
        members[member] = entry
        meta = dict(entry["tensor_meta"])
        if folder == "weights":
            sizes = [_int(s) for s in meta["sizes"]]
            strides: list[dict[str, int]] = []
            step = 1
            for size in reversed(sizes):
                strides.insert(0, {"as_int": step})
                step *= max(size, 1)
            meta.update(strides=strides, storage_offset={"as_int": 0})
        config[tensor] = {**entry, "path_name": member, "tensor_meta": meta}
    return members, config


def _int(value: Any) -> int:
    if isinstance(value, dict) and type(value.get("as_int")) is int:
        return int(value["as_int"])
    raise Unsafe("a weight whose size is no number")


def tensor_of(archive: Archive, folder: str, name: str) -> torch.Tensor:
    """Return one tensor of the archive; `ModelError` if its bytes do not suffice for its shape."""
    from torch._export.serde.serialize import deserialize_scalar_type

    entry = (archive.weights if folder == "weights" else archive.constants)[name]
    meta = entry["tensor_meta"]
    where = f"{archive.path}: {name}"
    try:
        sizes, strides = [_int(s) for s in meta["sizes"]], [_int(s) for s in meta["strides"]]
        dtype = deserialize_scalar_type(meta["dtype"])
        data = bytearray(archive.read(folder, entry))
        if 0 in sizes:
            return torch.zeros(sizes, dtype=dtype)
        return torch.frombuffer(data, dtype=dtype).as_strided(sizes, strides, _int(meta["storage_offset"]))
    except (KeyError, TypeError, ValueError, RuntimeError, zipfile.BadZipFile, zlib.error) as e:
        got = " ".join(str(e).split())[:120]
        raise ModelError(
            where, "as many bytes as its shape needs", got, "the file is cut or damaged: fetch it again"
        ) from e
