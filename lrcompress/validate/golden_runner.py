"""Answer golden inputs with plain ONNX Runtime, where nothing of lrcompress is installed.

Run as a file, with numpy and onnxruntime only, by the Python of the target:

    python golden_runner.py JOB.json
    JOB = {"model": "…/model.onnx", "inputs": "inputs.npz", "threads": 1, "result": "result.npz",
           "cases": {"base": null, "first": "first.npz"}}

A case is a set of adapter tensors that are fed beside the inputs; null is the graph as it stands. The archives hold
`tensor/NAME`. The result holds
`CASE/OUTPUT`; one JSON line on stdout says what answered, and how long each case took. With "one": "one.npz" the
graph is also timed on that single sample, `one_ms`: some runs, each by itself.
"""

from __future__ import annotations

import json
import platform
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort


def answer(job: dict[str, Any]) -> dict[str, Any]:
    """Run every case of `job`, write its result file, return what to print."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = int(job["threads"])
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    options.add_session_config_entry("session.x64quantprecision", "1")  # as `runtime.session` does; nothing on ARM
    session = ort.InferenceSession(str(job["model"]), options, providers=["CPUExecutionProvider"])
    names = [o.name for o in session.get_outputs()]
    inputs = _arrays(job["inputs"])
    answers: dict[str, np.ndarray] = {}
    ms: dict[str, float] = {}
    for case, file in job["cases"].items():
        feeds = _arrays(file) if file else {}
        started = time.perf_counter()
        outputs = session.run(names, {**inputs, **feeds})
        ms[case] = (time.perf_counter() - started) * 1e3
        answers.update({f"{case}/{name}": np.asarray(value) for name, value in zip(names, outputs, strict=True)})
    np.savez(job["result"], **answers)  # type: ignore[arg-type]
    found = {"machine": platform.machine(), "onnxruntime": ort.__version__, "numpy": np.__version__, "ms": ms}
    return {**found, "one_ms": timed(session, _arrays(job["one"]))} if job.get("one") else found


def timed(session: ort.InferenceSession, inputs: dict[str, np.ndarray]) -> list[float]:
    """Return how long single runs take, after a few that do not count; slow models get fewer runs, not more time."""
    for _ in range(5):
        session.run(None, inputs)
    ms: list[float] = []
    began = time.perf_counter()
    while len(ms) < 100 and (len(ms) < 3 or time.perf_counter() - began < 2.0):
        started = time.perf_counter()
        session.run(None, inputs)
        ms.append((time.perf_counter() - started) * 1e3)
    return ms


def _arrays(file: str) -> dict[str, np.ndarray]:
    with np.load(file, allow_pickle=False) as archive:
        return {name.partition("/")[2]: archive[name] for name in archive.files}


if __name__ == "__main__":
    print(json.dumps(answer(json.loads(Path(sys.argv[1]).read_text()))))
