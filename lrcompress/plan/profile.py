"""Device profiles: what a kind of device has and allows, one YAML file each.

profile = load_profile("raspberry-pi-4")            # one that ships, or a file
"""

from __future__ import annotations

from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from ..errors import ProfileError
from ..latency import LatencyTable, read_table
from ..yamlfile import Part, parse

Positive = Annotated[int, Field(gt=0)]


class RuntimePart(Part):
    """Versions of ONNX Runtime that run on the device."""

    min: str
    max: str | None = None


class LatencyPart(Part):
    """Where the device's operator times come from; none yet means that they were not measured."""

    source: str
    table: str | None = None


class DeviceProfile(Part):
    """One kind of device. `sources` says for every figure where it comes from."""

    schema_: Literal[1] = Field(alias="schema")
    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]*$")]
    about: str = ""
    isa: Annotated[tuple[str, ...], Field(min_length=1)]
    cores: Positive
    ram_bytes: Positive
    flash_bytes: Positive
    os: str
    ort: RuntimePart
    threads: Positive
    max_update_bytes: Positive
    rank_multiple: Positive = 8
    latency: LatencyPart | None = None
    sources: dict[str, str]

    @model_validator(mode="after")
    def _consistent(self) -> DeviceProfile:
        if "64" not in self.os:
            raise ValueError("a 64-bit system: ONNX Runtime has no 32-bit wheels")
        if self.threads > self.cores:
            raise ValueError(f"at most as many threads as cores ({self.cores})")
        unknown = sorted(set(self.sources) - {f.alias or n for n, f in type(self).model_fields.items()})
        if unknown:
            near = get_close_matches(unknown[0], type(self).model_fields, 1)
            raise ValueError(
                f"sources of the figures above, not of {unknown[0]!r}" + (f" ({near[0]!r}?)" if near else "")
            )
        missing = sorted({"isa", "cores", "ram_bytes", "flash_bytes", "max_update_bytes"} - set(self.sources))
        if missing:
            raise ValueError(f"a source for {missing[0]}")
        return self


def table_of(profile: DeviceProfile | None, latency: str | Path | None, *, needed: bool) -> LatencyTable | None:
    """Return the latency table that is named, or the profile's own; None where there is none and none is needed.

    Raises `ProfileError` with how to get one.
    """
    if latency is not None:
        return read_table(Path(latency))
    own = None if profile is None or profile.latency is None else profile.latency.table
    if own is not None:
        return read_table(Path(own))
    if needed:
        name = "the device" if profile is None else profile.name
        raise ProfileError(
            "latency", f"a latency table of {name}", "none",
            "run 'lrcompress device profile -o table.json' on it, and give --latency table.json",
        )  # fmt: skip
    return None


def named_table(name: str | Path) -> LatencyTable:
    """Read the latency table that a file is, or that a device profile names. Raises `ProfileError`."""
    if str(name) in shipped() or Path(name).suffix in (".yaml", ".yml"):
        found = table_of(load_profile(name), None, needed=True)
        assert found is not None
        return found
    return read_table(Path(name))


def shipped() -> dict[str, Path]:
    """Return the profiles that ship, by name."""
    package = Path(__file__).parent.parent
    folders = [package / "_devices", package.parent / "devices"]
    return {p.stem: p for f in folders if f.is_dir() for p in sorted(f.glob("*.yaml"))}


def load_profile(device: str | Path) -> DeviceProfile:
    """Read and check a profile. Raises `ProfileError` with file, line and key path."""
    path, known = Path(device), shipped()
    if not path.is_file():
        if str(device) not in known:
            near = get_close_matches(str(device), known, 1)
            hint = f"did you mean {near[0]!r}?" if near else f"profiles that ship: {', '.join(known)}"
            raise ProfileError(device, "a device profile (YAML), or the name of one that ships", "neither", hint)
        path = known[str(device)]
    found = parse(path, DeviceProfile, error=ProfileError)
    if found.latency is None or found.latency.table is None or Path(found.latency.table).is_absolute():
        return found
    beside = str(path.parent / found.latency.table)  # a profile and its table travel together
    return found.model_copy(update={"latency": found.latency.model_copy(update={"table": beside})})
