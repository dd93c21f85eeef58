"""Answer a job on another machine: what `ssh` runs there, with numpy and onnxruntime of that machine and nothing else.

It reads a tar of the job's files from stdin into a folder that vanishes with it, lets `golden_runner` answer, and
writes to stdout: a line with a mark, a line of JSON, and the bytes of the answers. What cannot be done there is told in
the JSON, as {"failed": why, …}. Python 3.8 and newer.
"""

import json
import os
import platform
import re
import sys
import tarfile
import tempfile

MARK = b"lrcompress-answers-1\n"


def main() -> None:
    """Unpack, answer, tell."""
    found, data = {}, b""
    with tempfile.TemporaryDirectory(prefix="lrcompress-") as folder:
        try:
            unpack(folder)
            found = answer(folder)
            if "failed" not in found:
                with open(os.path.join(folder, "result.npz"), "rb") as f:  # noqa: PTH118
                    data = f.read()
        except OSError as e:
            found = {"failed": "disk", "what": str(e)}
    found["machine"] = platform.machine()
    found["python"] = platform.python_version()
    out = sys.stdout.buffer
    out.write(MARK + json.dumps(found).encode() + b"\n" + data)
    out.flush()


def unpack(folder: str) -> None:
    """Write the plain files of the stream into `folder`, by their last names alone."""
    with tarfile.open(fileobj=sys.stdin.buffer, mode="r|") as archive:
        for member in archive:
            if member.isfile():
                source = archive.extractfile(member)
                with open(os.path.join(folder, os.path.basename(member.name)), "wb") as f:  # noqa: PTH118, PTH119
                    while True:
                        block = source.read(1 << 20)  # type: ignore[union-attr]
                        if not block:
                            break
                        f.write(block)


def answer(folder: str) -> "dict[str, object]":
    """Run the job in `folder`; return what `golden_runner` tells, or why it could not run."""
    os.chdir(folder)
    sys.path.insert(0, folder)
    with open("job.json") as f:
        job = json.load(f)
    with open("limits.json") as f:
        limits = json.load(f)
    try:
        import numpy
        import onnxruntime
    except ImportError as e:
        return {"failed": "missing", "what": str(e)}
    here = {"onnxruntime": onnxruntime.__version__, "numpy": numpy.__version__}
    if version(here["onnxruntime"]) < version(limits["min"]) or (
        limits["max"] and version(here["onnxruntime"]) > version(limits["max"])
    ):
        return {"failed": "version", **here}
    import golden_runner  # type: ignore[import-not-found]

    try:
        return dict(golden_runner.answer(job))
    except Exception as e:  # the runtime raises a private family; whatever it is, it is the answer
        return {"failed": "model", "what": " ".join(str(e).split())[:500], **here}


def version(text: str) -> "list[int]":
    """Return the leading numbers of a version."""
    return [int(n) for n in re.findall(r"\d+", text)[:3]]


if __name__ == "__main__":
    main()
