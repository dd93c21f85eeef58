"""The structure of the package: arrows only downward, and nothing heavy on the edge plane."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "lrcompress"

#: Top-level modules and packages by layer: an import goes to a lower row, or stays inside its own entry.
LAYERS: list[set[str]] = [
    {"_version", "errors", "progress"},
    {"files", "plugins"},
    {"manifest", "golden", "expansions", "encodings", "phases", "shrinkage"},
    {"payload"},
    {"deltas", "packs"},
    {"runtime"},
    {"edge", "latency"},
    # What a device runs ends here; from here on the [build] extra may be imported.
    {"threads"},
    # Graphs are worked on without torch, below everything that has it.
    {"graphs"},
    {"factorize", "yamlfile"},
    {"adapt"},
    {"model"},
    {"data"},
    {"metrics"},
    {"calibrate", "plan"},
    {"fit"},
    {"work"},
    {"recover", "export"},
    {"validate", "publish"},
    {"recipe", "report", "inspect"},
    {"verbs"},
    {"api"},
    {"pipeline"},
    {"cli"},
    {"__init__", "__main__"},
]
ROW = {name: i for i, row in enumerate(LAYERS) for name in row}
EDGE = {
    "errors",
    "files",
    "plugins",
    "progress",
    "_version",
    "manifest",
    "encodings",
    "expansions",
    "phases",
    "payload",
    "deltas",
    "packs",
    "golden",
    "runtime",
    "edge",
    "latency",
}
EDGE_MAY_IMPORT = set(sys.stdlib_module_names) | {
    "click",
    "numpy",
    "safetensors",
    "onnxruntime",
    "tuf",
    "securesystemslib",
    "urllib3",
}


def sources() -> list[Path]:
    return sorted(p for p in PACKAGE.rglob("*.py"))


def owner(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return parts[0]


def imports(path: Path) -> list[tuple[str, int]]:
    """Return every imported module as a dotted name, own ones starting with 'lrcompress.'; type-only imports count too."""
    package = ("lrcompress", *path.relative_to(PACKAGE).with_suffix("").parts)[:-1]
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [(a.name, node.lineno) for a in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = list(package[: len(package) - node.level + 1]) if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            if module == "lrcompress":
                found += [(f"lrcompress.{a.name}", node.lineno) for a in node.names]
            else:
                found.append((module, node.lineno))
    return found


def test_every_module_has_a_layer_and_every_layer_its_modules():
    assert {owner(p) for p in sources()} == set(ROW)
    assert sum(map(len, LAYERS)) == len(ROW), "a name stands in two rows"


@pytest.mark.parametrize("path", sources(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_arrows_point_down(path):
    me = owner(path)
    for name, line in imports(path):
        if not name.startswith("lrcompress."):
            continue
        target = name.split(".")[1]
        if target == me or target not in ROW:
            continue
        assert ROW[target] < ROW[me], f"{path.relative_to(ROOT)}:{line}: {me} may not import {target}"


def test_publish_and_edge_never_meet():
    for path in sources():
        names = {n.split(".")[1] for n, _ in imports(path) if n.startswith("lrcompress.")}
        if owner(path) == "publish":
            assert "edge" not in names, path
        if owner(path) == "edge":
            assert "publish" not in names, path


@pytest.mark.parametrize("path", [p for p in sources() if owner(p) in EDGE], ids=lambda p: str(p.relative_to(PACKAGE)))
def test_the_edge_imports_only_what_a_device_has(path):
    for name, line in imports(path):
        top = name.split(".")[0]
        assert top == "lrcompress" or top in EDGE_MAY_IMPORT, f"{path.relative_to(ROOT)}:{line}: {name}"


def test_every_package_is_listed_for_the_build():
    import tomllib

    listed = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])
    there = {".".join(p.parent.relative_to(ROOT).parts) for p in PACKAGE.rglob("__init__.py")}
    assert there <= listed, there - listed
    assert listed - there <= {"lrcompress._recipes", "lrcompress._devices"}


def test_importing_the_package_is_light():
    code = (
        "import sys, lrcompress; lrcompress.__dir__(); "
        "print(sorted({'torch','onnx','numpy','onnxruntime','click','yaml','pydantic'} & set(sys.modules)))"
    )
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
    )


def test_optimum_is_imported_by_one_file():
    users = [p for p in sources() if any(n.split(".")[0] == "optimum" for n, _ in imports(p))]
    assert len(users) <= 1, users
