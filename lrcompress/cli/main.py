"""The root command: lazy subcommands, one place for errors, exit codes and `--json`."""

from __future__ import annotations

import difflib
import importlib
import os
import sys
from typing import Any

import click

from .._version import __version__
from ..errors import LrcompressError, MissingExtraError
from .output import print_failure

#: Command -> module that defines it, the attribute there, and the line shown in the list.
COMMANDS: dict[str, tuple[str, str, str]] = {
    "inspect": (
        "lrcompress.cli.inspect",
        "inspect",
        "Look at the layers of a network, and at what the forms can represent.",
    ),
    "plan": ("lrcompress.cli.plan", "plan", "Choose form and rank of every layer under a budget."),
    "factorize": ("lrcompress.cli.factorize", "factorize", "Make a pretrained network small."),
    "recover": ("lrcompress.cli.recover", "recover", "Train a correction that wins the accuracy back."),
    "adapt": ("lrcompress.cli.adapt", "adapt", "Train kinds of adapters at equal bytes for new data; keep the best."),
    "adapter": ("lrcompress.cli.adapter", "adapter", "Convert, merge, check and combine adapters."),
    "export": ("lrcompress.cli.export", "export", "Write ONNX with separate factors and adapter slots."),
    "validate": ("lrcompress.cli.validate", "validate", "Check an exported model in ONNX Runtime, here and on ARM."),
    "publish": ("lrcompress.cli.publish", "publish", "Sign and publish corrections for a fleet."),
    "device": ("lrcompress.cli.device", "device", "Update and run a model on a device."),
    "run": ("lrcompress.cli.run", "run", "Run a recipe from model to device."),
    "report": ("lrcompress.cli.run", "report", "Write the report of a run again."),
    "completion": ("lrcompress.cli.completion", "completion", "Print the shell completion script."),
}

#: Packages of the extras: their absence is the user's to repair, not a bug of ours.
BUILD_PACKAGES = {
    "accelerate", "datasets", "jinja2", "joblib", "matplotlib", "onnx", "onnx_ir", "onnxscript", "optimum", "pydantic",
    "rich", "scipy", "sklearn", "tensorly", "threadpoolctl", "torch", "transformers", "yaml",
}  # fmt: skip


class Root(click.Group):
    """A group whose subcommands are imported when they are called."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module, attribute, _ = COMMANDS[cmd_name]
        command: click.Command = getattr(importlib.import_module(module), attribute)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and args[0] not in COMMANDS:
            near = difflib.get_close_matches(args[0], COMMANDS, 1)
            hint = f"; did you mean '{near[0]}'?" if near else f"; there are {', '.join(COMMANDS)}"
            ctx.fail(f"lrcompress: expected a command, got '{args[0]}'{hint}")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, line) for name, (_, _, line) in COMMANDS.items()])


@click.command(
    cls=Root,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
    epilog="Example: lrcompress factorize model.pt --rank 16",
)
@click.version_option(__version__, message="%(prog)s %(version)s")
def root() -> None:
    """Make pretrained networks small, correct them, run them in ONNX Runtime, update them in the field."""


def main(args: list[str] | None = None) -> None:
    """Run the command line and exit with the code of `interfaces`: 0, or who must act."""
    argv = sys.argv[1:] if args is None else args
    sys.exit(run(argv))


def run(argv: list[str]) -> int:
    """Run one command line; return its exit code."""
    as_json = "--json" in argv
    try:
        # Outside standalone mode click returns the code of an `Exit`; commands themselves return nothing.
        code = root.main(argv, prog_name="lrcompress", standalone_mode=False)
        return code if isinstance(code, int) else 0
    except LrcompressError as e:
        print_failure(e.as_dict(), str(e), as_json=as_json)
        return e.exit_code
    except click.ClickException as e:
        where = e.ctx.command_path if isinstance(e, click.UsageError) and e.ctx else "lrcompress"
        message = e.format_message()
        error = {
            "code": 2,
            "kind": "usage",
            "where": where,
            "expected": message,
            "got": "",
            "remedy": f"{where} --help",
        }
        print_failure(error, f"{where}: {message}; see '{where} --help'", as_json=as_json)
        return 2
    except (click.Abort, KeyboardInterrupt):
        # Where the signal came inside an `exec` of text, as dataclasses and torch do, CPython remembers it as unhandled
        # and `python -m` would die by it after all, whatever the exit code; the next `exec` forgets it.
        exec("")
        error = {
            "code": 130,
            "kind": "interrupted",
            "where": "lrcompress",
            "expected": "",
            "got": "",
            "remedy": "run it again",
        }
        print_failure(error, "interrupted; nothing half-written was left, the same command continues", as_json=as_json)
        return 130
    except ModuleNotFoundError as e:
        name = (e.name or "").partition(".")[0]
        if name not in BUILD_PACKAGES:
            return _bug(e, as_json)
        missing = MissingExtraError(f"lrcompress {argv[0] if argv else ''}".strip(), name)
        print_failure(missing.as_dict(), str(missing), as_json=as_json)
        return missing.exit_code
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (OSError, MemoryError) as e:
        return _environment(e, as_json)
    except Exception as e:
        return _bug(e, as_json)


def _environment(e: OSError | MemoryError, as_json: bool) -> int:
    where = getattr(e, "filename", None) or "this machine"
    got = (e.strerror or str(e)) if isinstance(e, OSError) else "out of memory"
    remedy = "free space or memory, or check the permissions"
    error = {
        "code": 10,
        "kind": "environment",
        "where": str(where),
        "expected": "a working disk and memory",
        "got": got,
        "remedy": remedy,
    }
    print_failure(error, f"{where}: expected a working disk and memory, got {got}; {remedy}", as_json=as_json)
    return 10


def _bug(e: BaseException, as_json: bool) -> int:
    """Say that this is ours; the traceback comes with LRCOMPRESS_TRACEBACK=1 only."""
    what: dict[str, Any] = {
        "code": 1, "kind": "bug", "where": type(e).__name__, "expected": "no exception", "got": " ".join(str(e).split())[:300],
        "remedy": "please report it, with the output of LRCOMPRESS_TRACEBACK=1",
    }  # fmt: skip
    print_failure(what, f"a bug in lrcompress: {what['where']}: {what['got']}; {what['remedy']}", as_json=as_json)
    if os.environ.get("LRCOMPRESS_TRACEBACK"):
        import traceback

        traceback.print_exception(e, file=sys.stderr)
    return 1
