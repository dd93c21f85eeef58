"""Progress bars with an ETA, on stderr, by Rich."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from ..progress import Advance


class RichProgress:
    """A `Progress` of one bar per task."""

    def __init__(self) -> None:
        self._live: Progress | None = None

    @contextlib.contextmanager
    def task(self, name: str, total: float | None = None) -> Iterator[Advance]:
        """Show a bar; a task inside a task is a second line of the same display."""
        outer = self._live
        bars = outer or Progress(
            TextColumn("[bold]{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
            TextColumn("eta"), TimeRemainingColumn(), TextColumn("{task.fields[note]}"), console=Console(stderr=True),
        )  # fmt: skip
        if outer is None:
            bars.start()
            self._live = bars
        identity = bars.add_task(name, total=total, note="")
        try:
            yield lambda n=1, text="": bars.update(identity, advance=n, note=text)
            bars.update(identity, note="")
        finally:
            if outer is None:
                bars.stop()
                self._live = None
