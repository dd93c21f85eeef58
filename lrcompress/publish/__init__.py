"""The publisher: keys, a TUF repository of static files, releases. Never imports the device side, nor it this.

init_repository("repo", "exported", "keys", passphrase=p)
add("repo", "adapters/first", group="default", passphrase=p)
"""

from __future__ import annotations

from .checking import verify
from .releases import add, init_repository, refresh, rollback, status

__all__ = ["add", "init_repository", "refresh", "rollback", "status", "verify"]
