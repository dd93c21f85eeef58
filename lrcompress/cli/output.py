"""What every command shares: the common options, the result, how it is printed, and progress on stderr.

@root_or_group.command(...)
@common
def factorize(model: str, shell: Shell, ...) -> Result:
    with shell.progress.task("factorize", total) as advance: ...
    return Result({"method": ...}, text="…")
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import click

from ..errors import LrcompressWarning
from ..files import finite
from ..progress import Advance, Progress, Silent

SCHEMA = 1


@dataclass(frozen=True)
class Result:
    """What a command found: `data` for `--json`, `text` for a person; `exit_code` if it is a miss that was reported."""

    data: dict[str, Any]
    text: str = ""
    exit_code: int = 0


@dataclass
class Shell:
    """What a command may use of the terminal."""

    as_json: bool = False
    quiet: bool = False
    verbose: bool = False
    progress: Progress = field(default_factory=Silent)

    def note(self, line: str) -> None:
        """Print one line on stderr, unless --quiet."""
        if not self.quiet and speaks():
            click.echo(line, err=True)


def common(function: Callable[..., Result]) -> Callable[..., None]:
    """Add --json, --quiet, --verbose; pass `shell`; print the returned `Result`."""

    @click.option("--json", "as_json", is_flag=True, help="Print exactly one JSON object on stdout.")
    @click.option("--quiet", "-q", is_flag=True, help="No progress and no notes on stderr.")
    @click.option("--verbose", "-v", is_flag=True, help="More on stderr.")
    @functools.wraps(function)
    def wrapped(as_json: bool, quiet: bool, verbose: bool, **options: Any) -> None:
        shell = Shell(as_json, quiet, verbose, Silent() if quiet or not speaks() else terminal_progress())
        started = time.perf_counter()
        with collect_warnings(shell) as notes:
            result = function(shell=shell, **options)
        print_result(result, seconds=time.perf_counter() - started, notes=notes, as_json=as_json)
        if result.exit_code:
            raise click.exceptions.Exit(result.exit_code)

    return wrapped


@contextlib.contextmanager
def collect_warnings(shell: Shell) -> Iterator[list[str]]:
    """Collect every `LrcompressWarning` and show it on stderr as it comes; other warnings only with --verbose."""
    notes: list[str] = []
    with warnings.catch_warnings():
        warnings.simplefilter("always" if shell.verbose else "ignore")
        warnings.simplefilter("always", LrcompressWarning)

        def show(message: Any, category: Any, filename: str, lineno: int, file: Any = None, line: Any = None) -> None:
            if issubclass(category, LrcompressWarning):
                notes.append(str(message))
            shell.note(f"warning: {message}")

        warnings.showwarning = show
        yield notes


def speaks() -> bool:
    """Tell whether this process prints: of several that torchrun started, the first one does."""
    return int(os.environ.get("WORLD_SIZE", "1")) == 1 or os.environ.get("RANK", "0") == "0"


def print_result(result: Result, *, seconds: float, notes: list[str], as_json: bool) -> None:
    if not speaks():
        return
    if as_json:
        head = {"ok": result.exit_code == 0, "schema": SCHEMA, "seconds": round(seconds, 3), "warnings": notes}
        click.echo(json.dumps(finite({**head, **result.data}), allow_nan=False))
    elif result.text:
        click.echo(result.text)


def print_failure(error: dict[str, Any], line: str, *, as_json: bool) -> None:
    """Print the one line of an error on stderr and, with --json, the one object on stdout."""
    if not speaks():
        return
    click.echo(f"error: {line}", err=True)
    if as_json:
        click.echo(json.dumps({"ok": False, "schema": SCHEMA, "error": error}))


def terminal_progress() -> Progress:
    """Return bars with an ETA on a terminal that has Rich, a line per finished task elsewhere."""
    if sys.stderr.isatty():
        with contextlib.suppress(ImportError):
            from .bars import RichProgress

            return RichProgress()
    return Lines()


class Lines:
    """A `Progress` for logs: one line when a task ends."""

    @contextlib.contextmanager
    def task(self, name: str, total: float | None = None) -> Iterator[Advance]:
        started = time.perf_counter()
        yield lambda n=1, text="": None
        click.echo(f"{name}: {time.perf_counter() - started:.1f} s", err=True)


def table(header: list[str], rows: list[list[str]], *, left: int = 1) -> str:
    """Return aligned text: the first `left` columns to the left, the others to the right."""
    cells = [header, *rows]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    lines = [
        "  ".join(
            c.ljust(w) if i < left else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in cells
    ]
    return "\n".join([lines[0], "  ".join("─" * w for w in widths), *lines[1:]])


def human_bytes(n: float) -> str:
    """Return bytes as a person reads them, decimal units: 999 B, 1.2 kB, 90.3 MB."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(n) < 1000 or unit == "GB":
            return f"{n:.0f} {unit}" if unit == "B" else f"{n:.1f} {unit}"
        n /= 1000
    raise AssertionError
