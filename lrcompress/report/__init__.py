"""The report of a run: `report.json`, and one `report.html` that needs no other file and no network.

    build_report(Path("runs/quickstart"))

Everything comes from the records in the run directory; a report can be written again at any time.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..errors import CommandError
from ..files import made_by, write_atomic, write_json
from .facts import gather
from .page import render
from .words import table_text

__all__ = ["build_report", "table_text"]


def build_report(run_dir: str | Path) -> dict[str, Any]:
    """Write report.json and report.html of a finished run, return the report; `CommandError` for another folder."""
    folder = Path(run_dir)
    if made_by(folder, "run.json") != "lrcompress run":
        raise CommandError(folder, "a run directory with run.json", "none", "make one with 'lrcompress run'")
    run = json.loads((folder / "run.json").read_text())
    if not run["complete"]:
        raise CommandError(
            folder, "a finished run", "an unfinished one", "give the same 'lrcompress run' again, it continues"
        )
    records = {}
    for stage in run["stages"]:
        try:
            records[stage["name"]] = json.loads((folder / stage["folder"] / "stage.json").read_text())
        except (OSError, ValueError) as e:
            raise CommandError(
                folder / stage["folder"], "the record of the stage", str(e), "run the recipe again"
            ) from e
    report = gather(run, records)
    write_json(folder / "report.json", report)
    write_atomic(folder / "report.html", render(report).encode())
    return report
