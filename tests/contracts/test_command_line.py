"""What every command owes: help with an example, one JSON object, an exit code that says who must act."""

from __future__ import annotations

import json
import subprocess
import sys

import click
import pytest

from lrcompress.cli.main import COMMANDS, root, run
from lrcompress.errors import LrcompressError


def every_command() -> list[tuple[str, ...]]:
    ctx = click.Context(root, info_name="lrcompress")
    out: list[tuple[str, ...]] = []

    def walk(command: click.Command, path: tuple[str, ...]) -> None:
        out.append(path)
        if isinstance(command, click.Group):
            for name in command.list_commands(ctx):
                child = command.get_command(ctx, name)
                assert child is not None
                walk(child, (*path, name))

    walk(root, ())
    return out


@pytest.mark.parametrize("path", every_command(), ids=lambda p: " ".join(p) or "lrcompress")
def test_help_shows_an_example(path, capsys):
    assert run([*path, "--help"]) == 0
    text = capsys.readouterr().out
    assert "Usage: lrcompress" in text and "xample" in text


@pytest.mark.parametrize("path", [p for p in every_command() if p], ids=" ".join)
def test_every_command_takes_json(path, capsys):
    ctx = click.Context(root)
    command: click.Command = root
    for name in path:
        assert isinstance(command, click.Group)
        found = command.get_command(ctx, name)
        assert found is not None
        command = found
    if not isinstance(command, click.Group):
        assert any("--json" in p.opts for p in command.params)


def test_an_unknown_command_says_what_was_meant(capsys):
    assert run(["factorise", "--json"]) == 2
    out, err = capsys.readouterr()
    assert "did you mean 'factorize'" in err and err.count("\n") == 1
    answer = json.loads(out)
    assert answer["ok"] is False and answer["error"]["code"] == 2


def test_a_wrong_option_is_usage(capsys):
    assert run(["completion", "tcsh"]) == 2
    assert capsys.readouterr().err.startswith("error: lrcompress completion: ")


def test_completion_scripts(capsys):
    for shell in ("bash", "zsh", "fish"):
        assert run(["completion", shell]) == 0
        assert "_LRCOMPRESS_COMPLETE" in capsys.readouterr().out


def test_success_is_one_json_object(capsys):
    assert run(["completion", "bash", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["ok"] is True and answer["schema"] == 1 and answer["seconds"] >= 0 and answer["warnings"] == []


def test_a_bug_is_ours_and_shows_no_traceback(capsys, monkeypatch):
    def broken(*args: object, **kwargs: object) -> None:
        raise ZeroDivisionError("division by zero")

    monkeypatch.setattr(root, "main", broken)
    assert run(["completion", "bash", "--json"]) == 1
    out, err = capsys.readouterr()
    assert json.loads(out)["error"]["kind"] == "bug" and "Traceback" not in err


@pytest.mark.parametrize(
    ("raised", "code"), [(KeyboardInterrupt(), 130), (MemoryError(), 10), (OSError(28, "No space left on device"), 10)]
)
def test_interrupts_and_full_machines(capsys, monkeypatch, raised, code):
    def stop(*args: object, **kwargs: object) -> None:
        raise raised

    monkeypatch.setattr(root, "main", stop)
    assert run(["completion", "bash", "--json"]) == code
    out, err = capsys.readouterr()
    assert json.loads(out)["error"]["code"] == code and err.count("\n") == 1


def test_a_missing_extra_is_named():
    """In a process that cannot import torch, `factorize` says what to install."""
    code = "import sys; sys.modules['torch'] = None; from lrcompress.cli.main import run; sys.exit(run(['factorize', 'x.pt', '--rank', '4']))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 10 and "lrcompress[build]" in done.stderr and done.stderr.count("\n") == 1, done.stderr


def test_exit_codes_are_those_of_the_contract():
    import lrcompress.errors as errors

    codes = {
        c.__name__: c.exit_code for c in vars(errors).values() if isinstance(c, type) and issubclass(c, LrcompressError)
    }
    assert codes == {
        "LrcompressError": 1, "CommandError": 2, "RecipeError": 3, "PlanError": 3, "ProfileError": 3, "ModelError": 4, "ParityError": 5,
        "TrustError": 6, "ManifestError": 6, "PayloadError": 6, "UpdateError": 6, "DeviceStateError": 7, "DownloadError": 8,
        "DataError": 9, "HostError": 10, "MissingExtraError": 10, "BudgetError": 11,
    }  # fmt: skip


def test_a_message_is_one_line_with_its_four_parts():
    e = LrcompressError("a.pt", "a checkpoint", "line one\nline two", "download it again")
    assert str(e) == "a.pt: expected a checkpoint, got line one line two; download it again"
    assert e.as_dict() == {
        "code": 1,
        "kind": "bug",
        "where": "a.pt",
        "expected": "a checkpoint",
        "got": "line one line two",
        "remedy": "download it again",
    }


def test_the_list_of_commands_is_the_list_of_files():
    assert set(COMMANDS) == {p[0] for p in every_command() if p}
