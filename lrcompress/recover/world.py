"""The processes that train together: one, or as many as torchrun started, joined through Accelerate.

    world = World.join(device="cpu")                 # HostError where fewer came than were promised
    with world.together("open"):                     # an error of one is the error of all
        data = open_data(...)
    total = world.sum(gradient)

Values are summed, never averaged: what is summed is divided by the number of samples of the whole batch. Only the
first process prints and writes.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import HostError, LrcompressError


@dataclass(frozen=True)
class World:
    """`rank` of `size` processes, computing on `device`."""

    rank: int = 0
    size: int = 1
    device: str = "cpu"

    @classmethod
    def join(cls, device: str = "cpu", promised: int | None = None) -> World:
        """Join the processes that the environment tells of, gloo on CPUs and NCCL on GPUs.

        Raises `HostError` where fewer than `promised`, or than the launcher was asked for, are there.
        """
        size, asked = int(os.environ.get("WORLD_SIZE", "1")), _asked(os.environ)
        expected = promised if promised is not None else asked
        if expected is not None and size != expected:
            count = f"{expected} processes" if expected > 1 else "more than one process"
            raise HostError(
                "lrcompress recover", count, f"{size}: the launcher did not start the others",
                "start them with: torchrun --nproc_per_node N -m lrcompress recover …",
            )  # fmt: skip
        if size == 1:
            return cls(device=device)
        from accelerate import PartialState

        # Accelerate names the process group after the device: gloo here, NCCL on GPUs.
        state = PartialState(cpu=True, backend="gloo") if device == "cpu" else PartialState()
        if state.num_processes != size:
            raise HostError(
                "lrcompress recover", f"{size} processes", f"{state.num_processes}", "start them with torchrun"
            )
        return cls(state.process_index, size, str(state.device))

    @property
    def first(self) -> bool:
        return self.rank == 0

    def sum(self, value: Tensor) -> Tensor:
        """Return the sum over all processes, the same bits in each."""
        if self.size == 1:
            return value
        from accelerate.utils import reduce

        total: Tensor = reduce(value, reduction="sum")
        return total

    def sum_gradients(
        self, parameters: Sequence[nn.Parameter], told: Sequence[float], error: Exception | None
    ) -> list[float]:
        """Leave in `parameters` the sum of all processes' gradients; return the sums of the numbers that are told with them.

        An error of one process is raised in all.
        """
        if self.size == 1:
            self.agree(error)
            return list(told)
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        numbers = torch.tensor([0.0, *told], dtype=torch.float64, device=self.device)
        flat = torch.cat([numbers, *(g.flatten().double() for g in grads)])
        if error is not None:
            flat = torch.zeros_like(flat)
            flat[0] = 1.0
        flat = self.sum(flat)
        if float(flat[0]) > 0:
            self.agree(error)
        start = len(numbers)
        for p in parameters:
            p.grad = flat[start : start + p.numel()].view_as(p).to(p.dtype)
            start += p.numel()
        found: list[float] = flat[1 : len(numbers)].tolist()
        return found

    def from_first(self, value: Any) -> Any:
        """Return what the first process gives: a plain value."""
        if self.size == 1:
            return value
        from accelerate.utils import broadcast_object_list

        return broadcast_object_list([value])[0]

    def tensors_from_first(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the tensors that the first process gives, whatever the others give."""
        if self.size == 1:
            return dict(tensors)
        from accelerate.utils import broadcast

        about = self.from_first([(n, tuple(t.shape), t.dtype) for n, t in sorted(tensors.items())])
        found = {}
        for name, shape, dtype in about:
            mine = tensors[name].to(self.device) if self.first else torch.empty(shape, dtype=dtype, device=self.device)
            found[name] = broadcast(mine).cpu()
        return found

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """Run a block in all processes; what goes wrong in one is raised in all of them, the first one's error first."""
        if self.size == 1:
            yield
            return
        error: Exception | None = None
        try:
            yield
        except Exception as e:
            error = e
        self.agree(error)

    def agree(self, error: Exception | None) -> None:
        """Raise the error of the first process that has one, in all of them."""
        if self.size == 1:
            if error is not None:
                raise error
            return
        from accelerate.utils import gather_object

        found: list[Exception | None] = gather_object([_portable(error)])
        told = next((e for e in found if e is not None), None)
        if told is not None:
            raise error if error is not None and found.index(told) == self.rank else told

    def leave(self) -> None:
        """Take the process group apart: without it the end of a process looks like a failure to the others."""
        if self.size > 1 and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def _portable(error: Exception | None) -> Exception | None:
    """Return an error that another process can take: ours as they are, others by their name and text."""
    if error is None or isinstance(error, LrcompressError):
        return error
    return RuntimeError(f"{type(error).__name__}: {error}")


def _asked(environment: Mapping[str, str]) -> int | None:
    """Return how many processes a launcher was asked for but did not announce; None where nothing contradicts.

    `accelerate launch --cpu --num_processes N` starts one process and tells it where the first of several would be
    found, but not how many there are.
    """
    launched = "ACCELERATE_MIXED_PRECISION" in environment and "MASTER_PORT" in environment
    if not launched or "WORLD_SIZE" in environment:
        return None
    with contextlib.suppress(OSError, ValueError):
        words = Path(f"/proc/{os.getppid()}/cmdline").read_text().replace("=", "\0").split("\0")
        for name in ("--num_processes", "--num-processes"):
            if name in words:
                return int(words[words.index(name) + 1])
    return 2


__all__ = ["World"]
