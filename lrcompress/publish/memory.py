"""What was published with these keys, kept beside them: a repository that was set back is noticed before it signs.

KEYS/published.json      {model: {role: newest version, "seq:<group>": newest seq}}
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from pathlib import Path

from ..errors import HostError, LrcompressWarning, UpdateError
from ..files import write_json

FILE, SEQ = "published.json", "seq:"


def load(keys: Path, model: str) -> dict[str, int]:
    """Return what is known; nothing where the file is missing or damaged."""
    try:
        value = json.loads((keys / FILE).read_text())[model]
        return {str(k): int(v) for k, v in value.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def check(repository: Path, known: Mapping[str, int], found: Mapping[str, int]) -> None:
    """Raise `UpdateError` for a repository that is older than what is known."""
    for role, version in known.items():
        if not role.startswith(SEQ) and found.get(role, 0) < version:
            raise UpdateError(
                repository, f"version {version} of {role}, which was published", f"{found.get(role, 0)}: this is an older copy, and devices would refuse it",
                "restore the newest copy, or go on from this one with 'lrcompress publish refresh --recover'",
            )  # fmt: skip


def save(keys: Path, model: str, found: Mapping[str, int]) -> None:
    """Keep the higher of what is known and found. A folder that cannot be written is no reason to fail: it is said."""
    before, path = load(keys, model), keys / FILE
    known = {k: max(before.get(k, 0), found.get(k, 0)) for k in {**before, **found}}
    try:
        others = json.loads(path.read_text()) if path.exists() else {}
        write_json(path, {**others, model: known})
    except (HostError, OSError, ValueError, TypeError) as e:
        text = f"{path}: not written ({e}); a repository that is set back will not be noticed"
        warnings.warn(text, LrcompressWarning, 3)
