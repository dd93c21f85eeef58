"""The publisher: keys, a TUF repository of static files, releases. Never imports the device side, nor it this.

init_repository("repo", "exported", "keys", passphrase=p)
add("repo", "adapters/first", group="default", passphrase=p)
"""

from __future__ import annotations

from .checking import verify
from .creating import Setup
from .releases import add, base, init_repository, rollback, status
from .upkeep import prune, refresh, revoke, rotate_keys

__all__ = [
    "Setup", "add", "base", "init_repository", "prune", "refresh", "revoke", "rollback", "rotate_keys", "status", "verify",
]  # fmt: skip
