"""The process in which a trial runs: `python -m lrcompress.edge.probe`, a task and a payload on stdin, one line out."""

from __future__ import annotations

import contextlib
import json
import sys
from pathlib import Path

from ..errors import PayloadError
from ..golden import load_golden
from ..manifest import GOLDEN, Manifest, strict_json
from ..runtime.session import Session
from .trial import Limits, judge, judge_base


def main() -> int:
    """Print the verdict; exit 1 where there is none."""
    with contextlib.suppress(Exception):
        import resource

        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a crash must not fill the flash
    said = sys.stdout.buffer
    try:
        task = strict_json(sys.stdin.buffer.readline())
        data = sys.stdin.buffer.read()
        base, threads, limits = Path(task["base"]), int(task["threads"]), Limits(**task["limits"])
        if task["before"] is not None:
            judge_base(base, Path(task["before"]), limits, threads)
        session = Session(base, threads=threads, manifest=Manifest.load(base), verify=False)
        ms, base_ms = judge(data, session, load_golden(base / GOLDEN), limits)
    except PayloadError as e:
        said.write(json.dumps({"passed": False, "error": e.as_dict()}).encode())
        return 0
    except Exception as e:  # memory, a rotted base, a full pipe: nothing that the payload can be blamed for
        said.write(json.dumps({"passed": None, "error": str(e) or type(e).__name__}).encode())
        return 1
    said.write(json.dumps({"passed": True, "error": None, "ms": ms, "base_ms": base_ms}).encode())
    return 0


if __name__ == "__main__":
    sys.exit(main())
