"""A private aarch64 Python with ONNX Runtime, run by QEMU in user mode: `arm_root()` returns its folder.

    python = arm_root() / "bin" / "arm-python"          # QEMU_CPU=cortex-a76 chooses the processor

Nothing is installed on the host and root is not needed. A private apt, with the host's sources and keys but its own
lists and an empty package state, downloads a foreign Python and a static emulator; dpkg-deb unpacks them; pip fetches
the aarch64 wheels of the very onnxruntime and numpy that run here. The tree is built once (about a minute) under a
lock, in a staging folder that is renamed; its name is the digest of everything that decides its content. Where a step
is impossible, one `HostError` says which.

This proves that answers are right on ARM. It says nothing about time.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path

from ..errors import HostError
from ..files import disk_errors, sha256_json
from ..progress import Progress, Silent

WHERE = "arm64 emulation"
#: The processors on which a new tree must answer before it is used: without and with dot-product instructions.
CHECKED_CPUS = ("cortex-a53", "cortex-a76")
_TOOLS = ("apt-get", "apt-cache", "dpkg", "dpkg-deb", "tar", "getconf", "readlink")
_HERE = Path(__file__).parent
_SOURCES = ("arm_root.py", "arm_python.sh", "arm_probe.py", "golden_runner.py")
_LISTS_FRESH_S, _TREE_KEPT_S = 86_400, 30 * 86_400
#: Depended on by name, useless without the scripts that dpkg would run.
_UNUSED_DEBS = {"dpkg", "tar"}


def cache_folder() -> Path:
    """Return lrcompress's cache: LRCOMPRESS_CACHE, else below XDG_CACHE_HOME, else ~/.cache."""
    own = os.environ.get("LRCOMPRESS_CACHE")
    if own:
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lrcompress"


#: What answers golden inputs, see `golden_runner`.
RUNTIME = ("onnxruntime", "numpy")


def arm_root(progress: Progress | None = None, packages: Sequence[str] = RUNTIME) -> Path:
    """Return the tree, building it if there is none for these versions. Raises `HostError` where that cannot be.

    `packages`, extras in brackets, are those of this environment in their versions here, with what they need.
    """
    cache = (cache_folder() / "arm-root").resolve()
    pins = [f"{name}=={metadata.version(name.partition('[')[0])}" for name in packages]
    key = sha256_json([pins, *((_HERE / name).read_text() for name in _SOURCES)])[:16]
    tree = cache / f"tree-{key}"
    if (tree / "made").is_file():
        with contextlib.suppress(OSError):
            os.utime(tree / "made")
        return tree
    _require_tools(cache)
    with disk_errors(cache):
        cache.mkdir(parents=True, exist_ok=True)
        with _locked(cache / "lock"):
            if not (tree / "made").is_file():
                _build(cache, tree, pins, progress or Silent())
                _forget_old(cache, tree)
    return tree


def cpus(root: Path) -> tuple[str, ...]:
    """Return the processors that the tree can be."""
    return tuple(sorted(p.name for p in (root / "cpu").iterdir()))


def _require_tools(cache: Path) -> None:
    missing = [t for t in _TOOLS if shutil.which(t) is None]
    if sys.platform != "linux" or missing:
        got = f"no {', '.join(missing)}" if missing else sys.platform
        raise HostError(WHERE, "a Debian-like Linux with apt and dpkg", got, "validate there, or leave --on arm64 out")
    if re.search(r'[\s"]', str(cache)):
        raise HostError(WHERE, "a cache path without blanks and quotes", cache, "set LRCOMPRESS_CACHE")
    if subprocess.run([sys.executable, "-m", "pip", "--version"], capture_output=True).returncode:
        raise HostError(WHERE, "pip in this Python", "none", f"{sys.executable} -m ensurepip")


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as f:
        fcntl.flock(f, fcntl.LOCK_EX)
        yield


def _build(cache: Path, tree: Path, pins: Sequence[str], progress: Progress) -> None:
    for left in cache.glob(".stage-*"):
        shutil.rmtree(left, ignore_errors=True)
    stage = Path(tempfile.mkdtemp(dir=cache, prefix=".stage-"))
    steps = _Steps(cache, stage / "root", stage / "log")
    steps.root.mkdir()
    try:
        with progress.task("build the ARM emulation", total=5) as advance:
            python, glibc = steps.foreign_python()
            advance(1, f"python {python}")
            steps.emulator()
            advance(1, "emulator")
            steps.wheels(pins, python, glibc)
            advance(1, ", ".join(pins))
            steps.processors(python)
            advance(1, "processors")
            steps.check()
            advance(1, "checked")
        (steps.root / "made").write_text("\n".join([f"python {python}", f"glibc {glibc}", *pins]) + "\n")
        shutil.rmtree(tree, ignore_errors=True)
        steps.root.rename(tree)
        (cache / "failed.log").unlink(missing_ok=True)
    except HostError:
        with contextlib.suppress(OSError):
            shutil.copyfile(steps.log, cache / "failed.log")
        raise
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def _forget_old(cache: Path, tree: Path) -> None:
    """Remove trees of other versions that nobody has used for a month."""
    for other in cache.glob("tree-*"):
        made = other / "made"
        if other != tree and (not made.is_file() or time.time() - made.stat().st_mtime > _TREE_KEPT_S):
            shutil.rmtree(other, ignore_errors=True)


class _Steps:
    """The steps of one build; each leaves its part in `root` and what its tools said in `log`."""

    def __init__(self, cache: Path, root: Path, log: Path) -> None:
        self.cache, self.root, self.log = cache, root, log

    def run(
        self, what: str, command: Sequence[str | Path], *, cwd: Path | None = None, env: dict[str, str] | None = None
    ) -> str:
        """Run a tool; return its stdout, or raise `HostError` with the last line it wrote."""
        words = [str(c) for c in command]
        environment = {**os.environ, "LC_ALL": "C", "DEBIAN_FRONTEND": "noninteractive", **(env or {})}
        done = subprocess.run(
            words, capture_output=True, text=True, errors="replace", cwd=cwd, env=environment, stdin=subprocess.DEVNULL
        )
        with self.log.open("a") as f:
            f.write(f"$ {' '.join(words)}\n{done.stdout}{done.stderr}\n")
        if done.returncode:
            said = [line for line in (done.stderr or done.stdout).splitlines() if line.strip()]
            got = (
                said[-1] if said else f"exit {done.returncode}" if done.returncode > 0 else f"signal {-done.returncode}"
            )
            raise HostError(WHERE, what, got, f"see {self.cache / 'failed.log'}")
        return done.stdout

    def apt(self, arch: str) -> tuple[str, ...]:
        """Return the options of a private apt for `arch`, its indexes not older than a day."""
        home = self.cache / f"apt-{arch}"
        for part in ("state/lists/partial", "cache/archives/partial"):
            (home / part).mkdir(parents=True, exist_ok=True)
        (home / "state/status").write_text("")
        hooks = (
            "APT::Update::Pre-Invoke",
            "APT::Update::Post-Invoke",
            "APT::Update::Post-Invoke-Success",
            "DPkg::Pre-Install-Pkgs",
        )
        conf = home / "apt.conf"
        conf.write_text(
            "".join(f"#clear {name};\n" for name in ("APT::Architectures", *hooks))
            + f'APT::Architecture "{arch}";\nAPT::Architectures {{ "{arch}"; }};\nAPT::Install-Recommends "false";\n'
            + f'Dir::State "{home}/state";\nDir::State::status "{home}/state/status";\nDir::Cache "{home}/cache";\n'
            + 'APT::Sandbox::User "";\nAcquire::Languages "none";\nAcquire::Retries "2";\n'
            + 'Binary::apt-get::APT::Keep-Downloaded-Packages "true";\n'
        )
        updated = home / "updated"
        if not updated.is_file() or time.time() - updated.stat().st_mtime > _LISTS_FRESH_S:
            self.run(f"package indexes for {arch} from the configured apt sources",
                     ["apt-get", "-c", conf, "-o", "APT::Update::Error-Mode=any", "update"])  # fmt: skip
            updated.touch()
        return ("-c", str(conf))

    def foreign_python(self) -> tuple[str, str]:
        """Unpack the release's own arm64 Python with its libraries; return its X.Y and the glibc version."""
        conf = self.apt("arm64")
        said = self.run(
            "an arm64 python3 in the configured apt sources",
            ["apt-cache", *conf, "show", "--no-all-versions", "python3"],
        )
        found = re.search(r"^Version: (\d+\.\d+)", said, re.M)
        if not found:
            raise HostError(
                WHERE, "an arm64 python3 in the configured apt sources", "none", "add arm64 to the apt sources"
            )
        python = found[1]
        wanted = [f"python{python}", "libstdc++6", "libgcc-s1"]
        plan = self.run("a complete set of arm64 packages", ["apt-get", *conf, "-s", "install", *wanted])
        self.run("the arm64 packages", ["apt-get", *conf, "-y", "--download-only", "install", *wanted])
        (self.root / "usr/lib").mkdir(parents=True)
        (self.root / "lib").symlink_to("usr/lib")
        archives, glibc = self.cache / "apt-arm64/cache/archives", ""
        for name, version, arch in re.findall(r"^Inst (\S+) \((\S+) .*\[(\w+)\]\)", plan, re.M):
            if name in _UNUSED_DEBS:
                continue
            if name == "libc6":
                glibc = version
            self._unpack(archives / f"{name}_{version.replace(':', '%3a')}_{arch}.deb")
        for link in [p for p in self.root.rglob("*") if p.is_symlink() and str(p.readlink()).startswith("/")]:
            inside = self.root / str(link.readlink()).lstrip("/")
            link.unlink()
            link.symlink_to(os.path.relpath(inside, link.parent))
        return python, glibc

    def _unpack(self, deb: Path) -> None:
        with tempfile.NamedTemporaryFile(dir=self.root.parent, suffix=".tar") as tar:
            subprocess.run(["dpkg-deb", "--fsys-tarfile", str(deb)], stdout=tar, check=False)
            skip = [f"--exclude=./usr/share/{d}/*" for d in ("doc", "man", "locale", "lintian")]
            self.run(
                f"a readable {deb.name}",
                ["tar", "-x", "-f", tar.name, "-C", self.root, "--keep-directory-symlink", "--no-same-owner", *skip],
            )

    def emulator(self) -> None:
        """Take one statically linked qemu-aarch64 out of the host's own package."""
        native = self.run("dpkg", ["dpkg", "--print-architecture"]).strip()
        conf = self.apt(native)
        # Static until Debian 12 under one name, later under the other.
        for package, member in (("qemu-user-static", "qemu-aarch64-static"), ("qemu-user", "qemu-aarch64")):
            try:
                self.run("qemu", ["apt-get", *conf, "download", package], cwd=self.root.parent)
            except HostError:
                continue
            (deb,) = self.root.parent.glob(f"{package}_*.deb")
            self.run("qemu", ["dpkg-deb", "-x", deb, self.root.parent / package])
            binary = self.root.parent / package / "usr/bin" / member
            if binary.is_file() and b"/ld-linux" not in binary.read_bytes()[:4096]:
                shutil.copy(binary, self.root / "qemu-aarch64")
                self.run("an emulator that runs here", [self.root / "qemu-aarch64", "--version"])
                return
        raise HostError(
            WHERE, "a statically linked qemu-aarch64 in the configured apt sources", "none", "leave --on arm64 out"
        )

    def wheels(self, pins: Sequence[str], python: str, glibc: str) -> None:
        """Install the aarch64 wheels of `pins`; older manylinux tags are not implied, so each is named."""
        newest = re.match(r"2\.(\d+)", glibc)
        platforms = [f"manylinux_2_{m}_aarch64" for m in range(int(newest[1]) if newest else 17, 16, -1)]
        abis = [f"cp{python.replace('.', '')}", "abi3", "none"]
        tags = ["--only-binary=:all:", "--implementation", "cp", "--python-version", python]
        tags += [word for abi in abis for word in ("--abi", abi)]
        tags += [word for p in ("linux_aarch64", "manylinux2014_aarch64", *platforms) for word in ("--platform", p)]
        pip = [sys.executable, "-m", "pip"]
        kept, here = self.cache / "wheels", self.root.parent / "wheels"
        kept.mkdir(exist_ok=True)
        quiet = ["--disable-pip-version-check", "--no-input"]
        self.run(
            f"aarch64 wheels of {', '.join(pins)}",
            [*pip, "download", *quiet, "--find-links", kept, "--dest", here, *tags, *pins],
        )
        found = sorted(here.glob("*.whl"))
        for wheel in found:
            if not (kept / wheel.name).is_file():
                shutil.copyfile(wheel, kept / wheel.name)
        same = python == f"{sys.version_info.major}.{sys.version_info.minor}"  # then its bytecode is the host's
        site = self.root / f"usr/local/lib/python{python}/dist-packages"
        offline = ["--no-index", "--no-deps", "--no-warn-script-location", "--compile" if same else "--no-compile"]
        self.run("wheels that install", [*pip, "install", *quiet, *offline, "--target", site, *tags, *found])

    def processors(self, python: str) -> None:
        """Give every processor that QEMU knows a view of the tree with its own /proc/cpuinfo, and write the wrapper."""
        (self.root / "bin").mkdir()
        # Python finds its libraries from where its name stands: the real file has to be in usr/bin.
        wrapper = self.root / "usr/bin/arm-python"
        (self.root / "bin/arm-python").symlink_to("../usr/bin/arm-python")
        wrapper.write_text((_HERE / "arm_python.sh").read_text().replace("@PYTHON@", python))
        wrapper.chmod(0o755)
        qemu = self.root / "qemu-aarch64"
        probe: list[str | Path] = [
            qemu,
            "-L",
            self.root,
            self.root / f"usr/bin/python{python}",
            "-I",
            "-S",
            _HERE / "arm_probe.py",
        ]
        listed = subprocess.run([qemu, "-cpu", "help"], capture_output=True, text=True).stdout  # its exit status is 1
        for cpu in re.findall(r"^\s+([a-z0-9][\w.-]*)", listed, re.M):
            try:
                block = self.run(f"a processor {cpu}", probe, env={"QEMU_CPU": cpu})
            except HostError:  # a 32-bit or too old one
                continue
            view = self.root / "cpu" / cpu
            (view / "proc").mkdir(parents=True)
            for part in ("usr", "lib", "etc"):
                if (self.root / part).exists():
                    (view / part).symlink_to(f"../../{part}")
            (view / "one-processor").write_text(block)
        missing = [c for c in CHECKED_CPUS if not (self.root / "cpu" / c).is_dir()]
        if missing:
            expected = f"an emulated Python that runs on {missing[0]}"
            raise HostError(WHERE, expected, "it does not", f"see {self.cache / 'failed.log'}")

    def check(self) -> None:
        """Let the tree import its ONNX Runtime on each of `CHECKED_CPUS`: that is where a wrong cpuinfo crashes."""
        code = "import platform, onnxruntime; assert platform.machine() == 'aarch64'; print(onnxruntime.__version__)"
        for cpu in CHECKED_CPUS:
            command: list[str | Path] = [self.root / "bin/arm-python", "-c", code]
            self.run(f"an ONNX Runtime that starts on {cpu}", command, env={"QEMU_CPU": cpu})
