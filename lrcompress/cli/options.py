"""Options that several commands share: how a model is opened, what is trusted, where it computes."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable
from decimal import Decimal
from typing import Any

import click

from ..errors import CommandError

_UNITS = {"": 1, "b": 1, "kb": 1000, "mb": 1000**2, "gb": 1000**3, "kib": 1024, "mib": 1024**2, "gib": 1024**3}


def arch_arguments(pairs: tuple[str, ...]) -> dict[str, Any]:
    """Return `k=v` pairs as a dict; values are JSON, or plain text where they are none."""
    out: dict[str, Any] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key.isidentifier():
            raise CommandError("--arch-arg", "NAME=VALUE", pair, "for example --arch-arg depth=20")
        try:
            out[key] = json.loads(value)
        except ValueError:
            out[key] = value
    return out


def model_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add --arch, --arch-arg, --input, --trust-pickle, --trust-remote-code."""

    @click.option(
        "--arch", metavar="MODULE:CALLABLE", help="What builds the network: pkg.mod:callable or path/file.py:callable."
    )
    @click.option("--arch-arg", "arch_args", multiple=True, metavar="K=V", help="An argument for --arch (JSON value).")
    @click.option(
        "--input", "inputs", multiple=True, metavar="NAME:DTYPE:DIMS", help="An input, e.g. x:float32:batch,3,32,32."
    )
    @click.option("--trust-pickle", is_flag=True, help="Allow files that can run code while they are opened.")
    @click.option("--trust-remote-code", is_flag=True, help="Allow code that a Hugging Face folder brings.")
    @functools.wraps(function)
    def wrapped(**options: Any) -> Any:
        return function(**options)

    return wrapped


class Size(click.ParamType[int]):
    """A number of bytes as a person writes it: 6MB, 512 KiB, 1500000."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", str(value))
        if found is None or found[2].lower() not in _UNITS:
            self.fail(f"{value!r} is no size; for example 6MB or 512KiB", param, ctx)
        return int(Decimal(found[1]) * _UNITS[found[2].lower()])


class Bits(click.ParamType[tuple[int, ...]]):
    """Numbers with commas between them: 32,8,4."""

    name = "bits"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, ...]:
        if isinstance(value, tuple):
            return value
        if not re.fullmatch(r"\d{1,4}(\s*,\s*\d{1,4})*", str(value).strip()):
            self.fail(f"{value!r} is no list of numbers; for example 8,4", param, ctx)
        return tuple(int(v) for v in str(value).split(","))


def compute_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add --seed, --threads, --compute."""

    @click.option("--seed", type=int, default=0, show_default=True, help="Seed of everything random.")
    @click.option("--threads", type=click.IntRange(min=1), help="Threads to compute with (recorded).")
    @click.option("--compute", default="auto", show_default=True, metavar="auto|cpu|cuda[:N]", help="Where to compute.")
    @functools.wraps(function)
    def wrapped(**options: Any) -> Any:
        return function(**options)

    return wrapped


def planning_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add --rank-multiple and --quick."""

    @click.option(
        "--rank-multiple", "multiple", type=click.IntRange(min=1), metavar="N",
        help="Budgets: ranks are multiples of N (what a device's kernels like), or whole.  [default: 1, or the device's]",
    )  # fmt: skip
    @click.option("--quick", is_flag=True, help="Budgets: predict losses only, measure nothing.")
    @functools.wraps(function)
    def wrapped(**options: Any) -> Any:
        return function(**options)

    return wrapped


def cache_option(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add --no-cache."""

    @click.option("--no-cache", is_flag=True, help="Collect calibration statistics again, and keep none.")
    @functools.wraps(function)
    def wrapped(no_cache: bool, **options: Any) -> Any:
        return function(cache=not no_cache, **options)

    return wrapped


def online_option(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add --online: without it the libraries that could call home are told not to, before they are imported."""

    @click.option("--online", is_flag=True, help="Let libraries use the network.")
    @functools.wraps(function)
    def wrapped(online: bool, **options: Any) -> Any:
        if not online:
            import os

            for name in (
                "HF_HUB_OFFLINE",
                "TRANSFORMERS_OFFLINE",
                "HF_DATASETS_OFFLINE",
                "HF_HUB_DISABLE_TELEMETRY",
                "DO_NOT_TRACK",
            ):
                os.environ.setdefault(name, "1")
        return function(**options)

    return wrapped
