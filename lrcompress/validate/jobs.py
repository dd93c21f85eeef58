"""A job as files, for whoever answers it elsewhere, and the answers as they come back.

task = write_job(folder, job)                       # inputs and payloads beside job.json; `golden_runner` reads them
outputs = read_answers(folder / "result.npz", job)
"""

from __future__ import annotations

import json
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..errors import HostError

if TYPE_CHECKING:
    from .targets import Job

JOB, INPUTS, RESULT = "job.json", "inputs.npz", "result.npz"


def write_job(folder: Path, job: Job, *, model: str, at: str | Path) -> list[str]:
    """Write the job's files into `folder`; return their names. `at`: where they lie for who reads them, `model` too.

    Cases are numbered: a name is nothing that a file system or another program should have to understand.
    """
    names = [INPUTS]
    _save(folder / INPUTS, job.inputs)
    cases: dict[str, str | None] = {}
    for i, payload in enumerate(job.cases.values()):
        cases[str(i)] = None
        if payload is not None:
            names.append(f"payload{i}.npz")
            _save(folder / names[-1], payload.feeds(job.manifest))
            cases[str(i)] = str(Path(at) / names[-1])
    task = {
        "model": model, "inputs": str(Path(at) / INPUTS), "threads": job.threads, "result": str(Path(at) / RESULT), "cases": cases,
    }  # fmt: skip
    (folder / JOB).write_text(json.dumps(task))
    return [JOB, *names]


def read_answers(path: Path, job: Job, *, where: object) -> dict[str, dict[str, np.ndarray]]:
    """Return outputs by case and name. Raises `HostError` for a file that holds no answers."""
    names = list(job.cases)
    outputs: dict[str, dict[str, np.ndarray]] = {case: {} for case in names}
    try:
        with np.load(path, allow_pickle=False) as archive:
            for key in archive.files:
                index, _, output = key.partition("/")
                outputs[names[int(index)]][output] = archive[key]
    except (OSError, ValueError, IndexError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as e:
        raise HostError(where, "answers as arrays", str(e), "run it again") from e
    return outputs


def _save(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    # The prefix keeps a tensor that is called like a parameter of savez apart from it.
    np.savez(path, **{f"tensor/{name}": value for name, value in arrays.items()})  # type: ignore[arg-type]
