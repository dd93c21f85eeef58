"""`lrcompress completion SHELL`: the script that makes the shell complete commands and options."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class

from ..errors import CommandError
from .output import Result, Shell, common


@click.command(epilog='Example: eval "$(lrcompress completion bash)"')
@click.argument("shell_name", metavar="SHELL", type=click.Choice(["bash", "zsh", "fish"]))
@common
def completion(shell_name: str, shell: Shell) -> Result:
    """Print the completion script for SHELL (bash, zsh or fish)."""
    from .main import root

    kind = get_completion_class(shell_name)
    if kind is None:
        raise CommandError("lrcompress completion", "bash, zsh or fish", shell_name)
    script = kind(root, {}, "lrcompress", "_LRCOMPRESS_COMPLETE").source()
    return Result({"shell": shell_name, "script": script}, text=script)
