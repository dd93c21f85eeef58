"""From a YAML file to plain values that know their line, and from pydantic's complaint to one line for the author."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml
from pydantic_core import ErrorDetails

from ..errors import RecipeError
from .schema import Part, Recipe

_MAX_BYTES, _MAX_NODES = 1 << 20, 20_000
_VARIABLE = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)(?::-([^}]*))?\}")
Lines = dict[tuple[str | int, ...], int]


def read(path: Path) -> tuple[dict[str, Any], dict[tuple[str | int, ...], int]]:
    """Return the plain value of a YAML file with variables put in, and the line of every key path."""
    try:
        raw = path.read_bytes()
        if len(raw) > _MAX_BYTES:
            raise RecipeError(path, f"at most {_MAX_BYTES} bytes", len(raw))
        node = yaml.compose(raw.decode(), Loader=yaml.SafeLoader)
    except UnicodeDecodeError as e:
        raise RecipeError(path, "UTF-8 text", str(e)) from e
    except (yaml.YAMLError, RecursionError) as e:
        mark = getattr(e, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else path
        raise RecipeError(where, "valid YAML", getattr(e, "problem", None) or type(e).__name__) from e
    if not isinstance(node, yaml.MappingNode):
        raise RecipeError(path, "a mapping of keys (schema, name, model, …)", "something else")
    lines: dict[tuple[str | int, ...], int] = {}
    value = _plain(node, (), lines, path)
    assert isinstance(value, dict)
    return value, lines


def _plain(node: yaml.Node, at: tuple[str | int, ...], lines: dict[tuple[str | int, ...], int], path: Path) -> Any:
    """Return the value of a node; records its line; refuses keys said twice and documents that unfold without end."""
    lines.setdefault(at, node.start_mark.line + 1)
    if len(lines) > _MAX_NODES:
        raise RecipeError(path, f"at most {_MAX_NODES} values", "more (aliases of aliases?)")
    if isinstance(node, yaml.MappingNode):
        out: dict[str, Any] = {}
        for key_node, value_node in node.value:
            key, line = str(getattr(key_node, "value", "")), key_node.start_mark.line + 1
            if key in out:
                raise RecipeError(f"{path}:{line}: {_dotted((*at, key))}", "a key once", "twice")
            lines[(*at, key)] = line
            out[key] = _plain(value_node, (*at, key), lines, path)
        return out
    if isinstance(node, yaml.SequenceNode):
        return [_plain(child, (*at, i), lines, path) for i, child in enumerate(node.value)]
    loader = yaml.SafeLoader("")
    try:
        value = loader.construct_object(node, deep=True)  # type: ignore[no-untyped-call]
    except (yaml.YAMLError, ValueError) as e:
        raise RecipeError(
            f"{path}:{node.start_mark.line + 1}: {_dotted(at)}", "a plain value", getattr(e, "problem", None) or e
        ) from e
    return _substitute(value, f"{path}:{node.start_mark.line + 1}: {_dotted(at)}") if isinstance(value, str) else value


def _substitute(text: str, where: str) -> str:
    def value(match: re.Match[str]) -> str:
        name, default = match.group(1), match.group(2)
        found = os.environ.get(name) or default
        if found is None:
            raise RecipeError(
                where, f"the environment variable {name}", "unset", f"set it, or write ${{{name}:-default}}"
            )
        return found

    return _VARIABLE.sub(value, text)


def _dotted(path: Sequence[str | int]) -> str:
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else str(part)
    return text or "(top)"


def explain(
    path: Path, error: ErrorDetails, value: Mapping[str, Any], lines: Mapping[tuple[str | int, ...], int]
) -> RecipeError:
    """Turn pydantic's first complaint into one line: file, line, key path, the nearest known key."""
    at = tuple(error["loc"])
    # Union members add their own name to the location; only what is in the file counts.
    while at and at not in lines:
        at = at[:-1]
    missing = error["type"] == "missing"
    where = f"{path}:{lines.get(at, 1)}: {_dotted(tuple(error['loc']) if missing else at)}"
    if error["type"] == "extra_forbidden":
        known = _known_keys(at[:-1])
        near = get_close_matches(str(at[-1]), known, 1)
        remedy = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}"
        return RecipeError(where, "a known key", repr(at[-1]), remedy)
    if missing:
        return RecipeError(where, "this key", "nothing")
    text = str(error["msg"]).removeprefix("Value error, ")
    return RecipeError(
        where, text[0].lower() + text[1:], repr(error["input"]) if not isinstance(error["input"], dict) else ""
    )


def _known_keys(at: Sequence[str | int]) -> list[str]:
    """Return the keys that the part at a key path takes."""
    part: Any = Recipe
    for step in at:
        if isinstance(step, int):
            continue
        fields = {f.alias or n: f for n, f in part.model_fields.items()}
        if step not in fields:
            continue  # a name the author chose: an input, a preprocessing entry
        part = next((c for c in _parts(fields[step].annotation)), part)
    return [f.alias or n for n, f in part.model_fields.items()]


def _parts(annotation: Any) -> list[type[Part]]:
    """Return the recipe parts inside an annotation such as `tuple[UpdatePart, ...]` or `ColumnsPart | None`."""
    if isinstance(annotation, type) and issubclass(annotation, Part):
        return [annotation]
    return [p for a in getattr(annotation, "__args__", ()) for p in _parts(a)]
