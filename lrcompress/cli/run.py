"""`lrcompress run` and `lrcompress report`."""

from __future__ import annotations

from pathlib import Path

import click

from .options import online_option
from .output import Result, Shell, common


@click.command(epilog="Example: lrcompress run quickstart")
@click.argument("recipe")
@click.option(
    "--run-dir", type=click.Path(path_type=Path), metavar="DIR", help="Where the stages lie  [default: runs/NAME]"
)
@online_option
@common
def run(shell: Shell, recipe: str, run_dir: Path | None) -> Result:
    """Run RECIPE (a file, or the name of one that ships) from model to device.

    A run that was stopped continues; one that is complete says so and does nothing.
    """
    from ..pipeline import run as run_pipeline
    from ..report import table_text

    report = run_pipeline(recipe, run_dir, shell.progress)
    place = Path(report["run_dir"])
    last = f"report: {place / 'report.html'}"
    if report["nothing_to_do"]:
        last = f"nothing to do: every stage in {place} is up to date\n{last}"
    return Result(report, text=f"{table_text(report)}\n\n{last}")


@click.command(epilog="Example: lrcompress report runs/quickstart")
@click.argument("run_dir", type=click.Path(path_type=Path))
@common
def report(shell: Shell, run_dir: Path) -> Result:
    """Write report.json and report.html of RUN_DIR again."""
    from ..report import build_report, table_text

    with shell.progress.task("report", total=1) as advance:
        found = build_report(run_dir)
        advance(1)
    return Result({**found, "run_dir": str(run_dir)}, text=f"{table_text(found)}\n\nreport: {run_dir / 'report.html'}")
