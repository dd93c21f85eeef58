"""The command line: parse, call, print. One file per command group; each loads only when it is used.

A command is a function wrapped by `command(...)` that returns a `Result`: the JSON object of `--json` and the
text a person reads. stdout carries results, stderr everything else.
"""

from .main import main

__all__ = ["main"]
