"""YAML files that people write, recipes and device profiles: plain values that know their line, checked by a schema.

recipe = parse(path, Recipe, error=RecipeError)     # one line with file, line, key path and the nearest known key
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_core import ErrorDetails

from .errors import LrcompressError

_MAX_BYTES, _MAX_NODES = 1 << 20, 20_000
_VARIABLE = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)(?::-([^}]*))?\}")
Lines = dict[tuple[str | int, ...], int]
Failure = type[LrcompressError]


class Part(BaseModel):
    """A frozen part of a file in which every key is known."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


Schema = TypeVar("Schema", bound=Part)


def parse(path: Path, schema: type[Schema], *, error: Failure) -> Schema:
    """Read a file and check it against `schema`; raise `error` with file, line and key path."""
    value, lines = read(path, error)
    try:
        return schema.model_validate(value)
    except ValidationError as e:
        # A misspelt key is both unknown and missing: the unknown one is the cause.
        first = min(e.errors(), key=lambda found: found["type"] != "extra_forbidden")
        raise explain(path, first, schema, lines, error) from e


def read(path: Path, error: Failure) -> tuple[dict[str, Any], Lines]:
    """Return the plain value of a YAML file with variables put in, and the line of every key path."""
    try:
        raw = path.read_bytes()
        if len(raw) > _MAX_BYTES:
            raise error(path, f"at most {_MAX_BYTES} bytes", len(raw))
        node = yaml.compose(raw.decode(), Loader=yaml.SafeLoader)
    except UnicodeDecodeError as e:
        raise error(path, "UTF-8 text", str(e)) from e
    except (yaml.YAMLError, RecursionError) as e:
        mark = getattr(e, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else path
        raise error(where, "valid YAML", getattr(e, "problem", None) or type(e).__name__) from e
    if not isinstance(node, yaml.MappingNode):
        raise error(path, "a mapping of keys (schema, name, model, …)", "something else")
    lines: Lines = {}
    value = _plain(node, (), lines, path, error)
    assert isinstance(value, dict)
    return value, lines


def _plain(node: yaml.Node, at: tuple[str | int, ...], lines: Lines, path: Path, error: Failure) -> Any:
    """Return the value of a node; records its line; refuses keys said twice and documents that unfold without end."""
    lines.setdefault(at, node.start_mark.line + 1)
    if len(lines) > _MAX_NODES:
        raise error(path, f"at most {_MAX_NODES} values", "more (aliases of aliases?)")
    if isinstance(node, yaml.MappingNode):
        out: dict[str, Any] = {}
        for key_node, value_node in node.value:
            key, line = str(getattr(key_node, "value", "")), key_node.start_mark.line + 1
            if key in out:
                raise error(f"{path}:{line}: {_dotted((*at, key))}", "a key once", "twice")
            lines[(*at, key)] = line
            out[key] = _plain(value_node, (*at, key), lines, path, error)
        return out
    if isinstance(node, yaml.SequenceNode):
        return [_plain(child, (*at, i), lines, path, error) for i, child in enumerate(node.value)]
    loader = yaml.SafeLoader("")
    try:
        value = loader.construct_object(node, deep=True)  # type: ignore[no-untyped-call]
    except (yaml.YAMLError, ValueError) as e:
        raise error(
            f"{path}:{node.start_mark.line + 1}: {_dotted(at)}", "a plain value", getattr(e, "problem", None) or e
        ) from e
    return (
        _substitute(value, f"{path}:{node.start_mark.line + 1}: {_dotted(at)}", error)
        if isinstance(value, str)
        else value
    )


def _substitute(text: str, where: str, error: Failure) -> str:
    def value(match: re.Match[str]) -> str:
        name, default = match.group(1), match.group(2)
        found = os.environ.get(name) or default
        if found is None:
            raise error(where, f"the environment variable {name}", "unset", f"set it, or write ${{{name}:-default}}")
        return found

    return _VARIABLE.sub(value, text)


def _dotted(path: Sequence[str | int]) -> str:
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else str(part)
    return text or "(top)"


def explain(path: Path, found: ErrorDetails, schema: type[Part], lines: Lines, error: Failure) -> LrcompressError:
    """Turn pydantic's first complaint into one line: file, line, key path, the nearest known key."""
    at = tuple(found["loc"])
    # Union members add their own name to the location; only what is in the file counts.
    while at and at not in lines:
        at = at[:-1]
    missing = found["type"] == "missing"
    where = f"{path}:{lines.get(at, 1)}: {_dotted(tuple(found['loc']) if missing else at)}"
    if found["type"] == "extra_forbidden":
        known = _known_keys(schema, at[:-1])
        near = get_close_matches(str(at[-1]), known, 1)
        remedy = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}"
        return error(where, "a known key", repr(at[-1]), remedy)
    if missing:
        return error(where, "this key", "nothing")
    text = str(found["msg"]).removeprefix("Value error, ")
    return error(
        where, text[0].lower() + text[1:], repr(found["input"]) if not isinstance(found["input"], dict) else ""
    )


def _known_keys(schema: type[Part], at: Sequence[str | int]) -> list[str]:
    """Return the keys that the part at a key path takes."""
    part: Any = schema
    for step in at:
        if isinstance(step, int):
            continue
        fields = {f.alias or n: f for n, f in part.model_fields.items()}
        if step not in fields:
            continue  # a name the author chose: an input, a preprocessing entry
        part = next((c for c in _parts(fields[step].annotation)), part)
    return [f.alias or n for n, f in part.model_fields.items()]


def _parts(annotation: Any) -> list[type[Part]]:
    """Return the parts inside an annotation such as `tuple[UpdatePart, ...]` or `ColumnsPart | None`."""
    if isinstance(annotation, type) and issubclass(annotation, Part):
        return [annotation]
    return [p for a in getattr(annotation, "__args__", ()) for p in _parts(a)]
