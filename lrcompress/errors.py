"""Every exception of lrcompress, its exit code, and who must act.

A message is one line: where, expected, got, what to do. The four parts are kept apart so that `--json` can
print them and tests can pin them. Wrong call order is `RuntimeError`, a wrong argument `ValueError`/`TypeError`.
"""

from __future__ import annotations


class LrcompressWarning(UserWarning):
    """Something the user should know that does not stop the work; the command line prints and returns these."""


class LrcompressError(Exception):
    """Root of the family. `str(e)` is the one line a person reads."""

    exit_code = 1
    kind = "bug"
    #: What to do, where the one who raises knows nothing better.
    usual_remedy = ""

    def __init__(self, where: object, expected: str, got: object = "", remedy: str = "") -> None:
        remedy = remedy or self.usual_remedy
        self.where, self.expected, self.got, self.remedy = _one_line(where), expected, _one_line(got), remedy
        text = f"{self.where}: expected {expected}"
        if self.got:
            text += f", got {self.got}"
        if remedy:
            text += f"; {remedy}"
        super().__init__(text)

    def __reduce__(self) -> tuple[object, ...]:
        # An error of another process comes as it is, whatever arguments its class takes.
        return _rebuilt, (type(self), self.args, self.__dict__)

    def as_dict(self) -> dict[str, object]:
        """The `error` object of `--json`."""
        return {
            "code": self.exit_code,
            "kind": self.kind,
            "where": self.where,
            "expected": self.expected,
            "got": self.got,
            "remedy": self.remedy,
        }


def _rebuilt(kind: type[LrcompressError], args: tuple[object, ...], state: dict[str, object]) -> LrcompressError:
    error = kind.__new__(kind, *args)
    error.args = args
    error.__dict__.update(state)
    return error


def _one_line(value: object, limit: int = 300) -> str:
    text = " ".join(str(value).split())
    if not text.isprintable():  # names come from files: no escape sequences, no half surrogates
        text = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)
    return text if len(text) <= limit else text[: limit - 1] + "…"


class CommandError(LrcompressError):
    """The command line is wrong (the caller must act)."""

    exit_code, kind = 2, "usage"
    usual_remedy = "see --help"


class RecipeError(LrcompressError):
    """A recipe is wrong (its author must act)."""

    exit_code, kind = 3, "recipe"
    usual_remedy = "correct the recipe"


class PlanError(LrcompressError):
    """A plan file is wrong, or does not belong to the model."""

    exit_code, kind = 3, "plan"
    usual_remedy = "correct the plan"


class ProfileError(LrcompressError):
    """A device profile is wrong."""

    exit_code, kind = 3, "device_profile"
    usual_remedy = "correct the profile"


class ModelError(LrcompressError):
    """A model file, its architecture or one of its layers cannot be used."""

    exit_code, kind = 4, "model"
    usual_remedy = "check the model, or give another"


class ParityError(LrcompressError):
    """Outputs or accuracy are beyond what was promised; `report` says by how much."""

    exit_code, kind = 5, "parity"
    usual_remedy = "export it again, or compress it less"

    def __init__(
        self,
        where: object,
        expected: str,
        got: object = "",
        remedy: str = "",
        *,
        report: dict[str, object] | None = None,
    ) -> None:
        super().__init__(where, expected, got, remedy)
        self.report = report or {}


class TrustError(LrcompressError):
    """Something signed, hashed or declared does not hold: it must not be used."""

    exit_code, kind = 6, "trust"
    usual_remedy = "do not use it; get it again from where it was made"


class ManifestError(TrustError):
    """An exported artifact is not what its manifest says."""

    kind = "manifest"


class PayloadError(TrustError):
    """An adapter payload is malformed or does not fit the base."""

    kind = "payload"


class UpdateError(TrustError):
    """Update metadata or a release cannot be trusted."""

    kind = "update"


class DeviceStateError(LrcompressError):
    """The state directory of a device is damaged, missing or somebody else's."""

    exit_code, kind = 7, "device_state"
    usual_remedy = "see 'lrcompress device status'"


class DownloadError(LrcompressError):
    """Bytes did not arrive: retry later."""

    exit_code, kind = 8, "download"
    usual_remedy = "try again later"


class DataError(LrcompressError):
    """Calibration, training or test data do not fit the model."""

    exit_code, kind = 9, "data"
    usual_remedy = "check the data"


class HostError(LrcompressError):
    """The machine lacks something: disk space, a permission, an extra, a tool."""

    exit_code, kind = 10, "environment"
    usual_remedy = "check this machine's tools, space and permissions"


class BudgetError(LrcompressError):
    """No choice meets the budget; the nearest one is named."""

    exit_code, kind = 11, "budget"
    usual_remedy = "allow more, or start from a smaller model"


class MissingExtraError(HostError):
    """A command needs packages that the base install does not bring."""

    kind = "missing_extra"

    def __init__(self, what: str, missing: str, extra: str = "build") -> None:
        super().__init__(
            what,
            f"the [{extra}] extra (package {missing!r})",
            "the base install",
            f"install it: pip install 'lrcompress[{extra}]' -c constraints.txt",
        )
