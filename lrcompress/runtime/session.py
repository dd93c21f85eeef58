"""ONNX Runtime with one active payload; a swap is one reference assignment between two requests.

session = Session(Path("exported"))
session.swap(parse(data))                 # checked against the manifest before anything changes
y = session.run({"x": x})["output"]       # thread-safe: a request sees one payload or the other, never half of one
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnxruntime as ort

from ..errors import DataError, ManifestError
from ..manifest import GRAPH, Manifest
from ..payload import Payload

#: Without it, x86 processors before VNNI multiply int8 by uint8 in 16 bits that overflow, silently: answers are
#: wrong. With it the runtime takes slower products there that do not; elsewhere it changes nothing.
EXACT_INT8 = ("session.x64quantprecision", "1")


def session_options(threads: int) -> ort.SessionOptions:
    """Return the options of every session: what is timed runs as what is served."""
    options = ort.SessionOptions()
    options.log_severity_level = 3  # the runtime warns once per slot that it is not constant: that is the point
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.add_session_config_entry(*EXACT_INT8)
    return options


@dataclass(frozen=True)
class Active:
    """What one request needs of a payload: our own copies, alive as long as anyone holds this object."""

    payload: Payload | None
    feeds: Mapping[str, ort.OrtValue]


class Session:
    """An exported model, loaded. `threads`: of one request; `verify`: hash every file first."""

    def __init__(
        self, exported: Path, *, threads: int = 1, manifest: Manifest | None = None, verify: bool = True
    ) -> None:
        exported = Path(exported)
        self.manifest = manifest or Manifest.load(exported, verify=False)
        if verify:
            self.manifest.verify_files(exported)
        self.manifest.check_runtime(ort.__version__)
        options = session_options(threads)
        try:
            self._session = ort.InferenceSession(str(exported / GRAPH), options, providers=["CPUExecutionProvider"])
        except Exception as e:  # the runtime raises its own private family
            raise ManifestError(
                exported / GRAPH, f"a graph that ONNX Runtime {ort.__version__} loads", e, "export it again"
            ) from e
        self._inputs = {i.name: i for i in self._session.get_inputs()}
        self._outputs = [o.name for o in self._session.get_outputs()]
        overridable = {i.name for i in self._session.get_overridable_initializers()}
        lost = sorted(set(self.manifest.slot_tensors) - overridable)
        if lost:
            raise ManifestError(
                exported / GRAPH, f"the slot {lost[0]} as an optional input", "the graph does not offer it"
            )
        self._active = Active(None, {})

    @property
    def payload(self) -> Payload | None:
        """The payload that the next request will see."""
        return self._active.payload

    @property
    def output_names(self) -> list[str]:
        return list(self._outputs)

    def prepare(self, payload: Payload | None) -> Active:
        """Verify `payload` and return what `activate` takes; nothing changes yet."""
        if payload is None:
            return Active(None, {})
        payload.verify(self.manifest)
        feeds = payload.feeds(self.manifest)
        return Active(payload, {k: ort.OrtValue.ortvalue_from_numpy(np.array(v, copy=True)) for k, v in feeds.items()})

    def activate(self, prepared: Active) -> None:
        self._active = prepared

    def swap(self, payload: Payload | None) -> None:
        """Serve with `payload` from the next request on; None is the factory model. `PayloadError` changes nothing."""
        self.activate(self.prepare(payload))

    def run(self, inputs: Mapping[str, np.ndarray], outputs: Sequence[str] | None = None) -> dict[str, np.ndarray]:
        """Return the named outputs for `inputs`. Raises `DataError` for other names, dtypes or shapes."""
        return self.run_with(self._active, inputs, outputs)

    def run_with(
        self, active: Active, inputs: Mapping[str, np.ndarray], outputs: Sequence[str] | None = None
    ) -> dict[str, np.ndarray]:
        """Run with something prepared that need not be active: what a trial does."""
        self._check(inputs)
        wanted = list(self._outputs if outputs is None else outputs)
        # Not ascontiguousarray, which makes one axis of a scalar. And not `run_with_ort_values`, which takes 0.1 ms more for
        # each request: `run` takes values of the runtime, too.
        feeds = {k: np.asarray(v, order="C") for k, v in inputs.items()}
        try:
            found = self._session.run(wanted, {**feeds, **active.feeds})
        except Exception as e:  # the same private family: shapes that only the graph knows
            raise DataError("inference", "inputs that the graph takes", e, "see 'inputs' in manifest.json") from e
        return dict(zip(wanted, found, strict=True))

    def _check(self, inputs: Mapping[str, np.ndarray]) -> None:
        if set(inputs) != set(self._inputs):
            raise DataError("inference: inputs", ", ".join(sorted(self._inputs)), ", ".join(sorted(inputs)) or "none")
        declared = {i["name"]: i for i in self.manifest.inputs}
        for name, value in inputs.items():
            spec = declared.get(name)
            if spec is None:
                continue
            if str(value.dtype) != spec["dtype"]:
                raise DataError(f"inference: input {name}", f"dtype {spec['dtype']}", value.dtype)
            shape = spec["shape"]
            if value.ndim != len(shape) or any(
                isinstance(d, int) and d != n for d, n in zip(shape, value.shape, strict=True)
            ):
                raise DataError(f"inference: input {name}", f"shape {shape}", list(value.shape))
