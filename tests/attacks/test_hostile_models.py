"""Files that want to run code, or that are no models: nothing runs, and one line says what is wrong.

Every planted payload would create a marker file. Where torch itself falls for an attack a test shows that it does, so
that the defence is known to be of use.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from lrcompress.errors import ModelError
from lrcompress.model import describe, open_model, skeleton
from lrcompress.model.archive import Unsafe, _check_target


class Planted:
    """Unpickled, it creates a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.marker),)


@pytest.fixture
def marker(tmp_path: Path) -> Path:
    return tmp_path / "marker"


def refused(path: Path, *expected: str, **options: Any) -> ModelError:
    """Assert that opening `path` is a `ModelError` of one line that says `expected`."""
    with pytest.raises(ModelError) as caught:
        open_model(path, **options)
    text = str(caught.value)
    assert "\n" not in text and len(text) < 1200 and caught.value.exit_code == 4
    assert caught.value.remedy or "--" in text
    for part in expected:
        assert part in text, text
    return caught.value


def without_code(marker: Path, path: Path, *expected: str, **options: Any) -> None:
    refused(path, *expected, **options)
    assert not marker.exists(), "the payload ran"


class TestPickles:
    @pytest.mark.parametrize("name", ["m.pt", "m.bin", "m.pth", "m.safetensors", "m.pt2"])
    @pytest.mark.parametrize("new", [True, False])
    @pytest.mark.parametrize("nested", [True, False])
    def test_a_planted_pickle_does_not_run(
        self, tmp_path: Path, marker: Path, name: str, new: bool, nested: bool
    ) -> None:
        payload = {"state_dict": {"w": torch.ones(2)}, "extra": Planted(marker)} if nested else Planted(marker)
        torch.save(payload, tmp_path / name, _use_new_zipfile_serialization=new)
        without_code(marker, tmp_path / name, "mkdir", "--trust-pickle")

    def test_the_payload_is_real(self, tmp_path: Path, marker: Path) -> None:
        torch.save(Planted(marker), tmp_path / "m.pt")
        with pytest.raises(ModelError):
            open_model(tmp_path / "m.pt", trust_pickle=True)
        assert marker.exists()

    def test_a_plain_pickle(self, tmp_path: Path, marker: Path) -> None:
        for protocol in (2, 4):
            (tmp_path / "m.bin").write_bytes(pickle.dumps(Planted(marker), protocol=protocol))
            without_code(marker, tmp_path / "m.bin", "--trust-pickle")

    def test_a_pickled_module_needs_trust(self, tmp_path: Path) -> None:
        torch.save(nn.Linear(2, 2), tmp_path / "m.pt")
        refused(tmp_path / "m.pt", "torch.nn.modules.linear.Linear", "--trust-pickle")

    def test_in_a_shard(self, tmp_path: Path, marker: Path) -> None:
        torch.save({"w": Planted(marker)}, tmp_path / "shard.bin")
        (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": {"w": "shard.bin"}}))
        without_code(marker, tmp_path / "pytorch_model.bin.index.json", "mkdir")
        without_code(marker, tmp_path, "mkdir")

    def test_inert_types_do_not_open_a_door(self, tmp_path: Path, marker: Path) -> None:
        """A NumPy array of objects is data, but what it holds must be inert too."""
        torch.save({"w": torch.ones(1), "a": np.array([Planted(marker)], dtype=object)}, tmp_path / "m.pt")
        without_code(marker, tmp_path / "m.pt", "mkdir")

    def test_torchscript(self, tmp_path: Path) -> None:
        torch.jit.script(nn.Linear(2, 2)).save(str(tmp_path / "m.pt"))
        refused(tmp_path / "m.pt", "TorchScript", "torch.export")
        refused(tmp_path / "m.pt", "TorchScript", trust_pickle=True)


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(x).relu()


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("program") / "good.pt2"
    exported = torch.export.export(Small().eval(), (torch.randn(2, 4),), dynamic_shapes=({0: torch.export.Dim("n")},))
    torch.export.save(exported, path)
    return path


Edit = Callable[[dict[str, bytes]], None]


def tampered(source: Path, dest: Path, edit: Edit) -> Path:
    """Write `source` with its members changed by `edit`, names relative to the root folder of the archive."""
    with zipfile.ZipFile(source) as z:
        root = z.namelist()[0].partition("/")[0]
        members = {n.partition("/")[2]: z.read(n) for n in z.namelist()}
    edit(members)
    with zipfile.ZipFile(dest, "w", zipfile.ZIP_STORED) as z:
        for name, data in members.items():
            z.writestr(f"{root}/{name}", data)
    return dest


def graph_edit(change: Callable[[dict[str, Any]], None]) -> Edit:
    def edit(members: dict[str, bytes]) -> None:
        graph = json.loads(members["models/model.json"])
        change(graph)
        members["models/model.json"] = json.dumps(graph).encode()

    return edit


def nodes(graph: dict[str, Any]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = graph["graph_module"]["graph"]["nodes"]
    return found


def first_expression(value: Any) -> dict[str, Any] | None:
    if isinstance(value, dict):
        if "expr_str" in value:
            return value
        value = list(value.values())
    if isinstance(value, list):
        for item in value:
            found = first_expression(item)
            if found is not None:
                return found
    return None


def pickled(value: Any) -> bytes:
    out = io.BytesIO()
    torch.save(value, out)
    return out.getvalue()


def system_node(marker: Path) -> dict[str, Any]:
    return {
        "target": "torch.os.mkdir",
        "inputs": [{"name": "", "arg": {"as_string": str(marker)}, "kind": 1}],
        "outputs": [],
        "metadata": {},
        "is_hop_single_tensor_return": None,
    }


class TestPrograms:
    def test_the_untouched_program_opens(self, program: Path, tmp_path: Path) -> None:
        assert open_model(tampered(program, tmp_path / "same.pt2", lambda m: None)).digest == open_model(program).digest

    def test_sample_inputs(self, program: Path, tmp_path: Path, marker: Path) -> None:
        def edit(members: dict[str, bytes]) -> None:
            members["data/sample_inputs/model.pt"] = pickled(((Planted(marker),), {}))

        path = tampered(program, tmp_path / "m.pt2", edit)
        without_code(marker, path, "sample_inputs", "mkdir")
        with pytest.raises(Exception):  # noqa: B017 (whatever torch raises after it ran the payload)
            torch.export.load(path).module()(torch.zeros(1))
        assert marker.exists(), "torch runs it: the check is needed"

    @pytest.mark.parametrize("folder", ["weights", "constants"])
    def test_pickled_tensors(self, program: Path, tmp_path: Path, marker: Path, folder: str) -> None:
        def edit(members: dict[str, bytes]) -> None:
            member = f"data/{folder}/model_{folder}_config.json"
            table = json.loads(members[member])
            name = "evil" if folder == "weights" else "c"
            table["config"][name] = {
                "path_name": "tensor_9",
                "is_param": False,
                "use_pickle": True,
                "tensor_meta": None,
            }
            members[member] = json.dumps(table).encode()
            members[f"data/{folder}/tensor_9"] = pickled(Planted(marker))

        without_code(marker, tampered(program, tmp_path / "m.pt2", edit), "a pickled tensor", "--trust-pickle")

    @pytest.mark.parametrize(
        "member", ["data/constants/custom_obj_0", "data/constants/opaque_obj_0", "data/aotinductor/model/x.so"]
    )
    def test_objects_and_libraries(self, program: Path, tmp_path: Path, marker: Path, member: str) -> None:
        path = tampered(program, tmp_path / "m.pt2", lambda m: m.update({member: pickled(Planted(marker))}))
        without_code(marker, path, member)

    def test_size_expressions_are_not_evaluated(self, program: Path, tmp_path: Path, marker: Path) -> None:
        def change(graph: dict[str, Any]) -> None:
            found = first_expression(graph)
            assert found is not None
            found["expr_str"] = f"__import__('os').mkdir('{marker}')"

        path = tampered(program, tmp_path / "m.pt2", graph_edit(change))
        without_code(marker, path, "size expression")
        with pytest.raises(Exception):  # noqa: B017
            torch.export.load(path)
        assert marker.exists(), "torch evaluates it: the check is needed"

    @pytest.mark.parametrize(
        "text",
        ["().__class__", "Symbol.__base__", "open('x')", "s0.free_symbols", "[1]", "lambda: 1", "Symbol('__import__')"],
    )
    def test_other_expressions(self, program: Path, tmp_path: Path, text: str) -> None:
        def change(graph: dict[str, Any]) -> None:
            found = first_expression(graph)
            assert found is not None
            found["expr_str"] = text

        refused(tampered(program, tmp_path / "m.pt2", graph_edit(change)), "size expression")

    def test_operators_that_are_no_operators(self, program: Path, tmp_path: Path, marker: Path) -> None:
        path = tampered(program, tmp_path / "m.pt2", graph_edit(lambda g: nodes(g).insert(0, system_node(marker))))
        without_code(marker, path, "torch.os.mkdir")

    @pytest.mark.parametrize(
        "target",
        [
            "torch.os.system",
            "torch.load",
            "torch.hub.load",
            "torch.ops.aten.save.default",
            "torch.ops.aten.from_file.default",
            "torch.ops.load_library",
            "_operator.methodcaller",
            "_operator.attrgetter",
            "#ns:f",
            "builtins.eval",
            "torch.ops.aten.linear.default\n",
            "torch.ops.mylib.f.default",
            "torch.ops.higher_order.triton_kernel_wrapper_mutation",
            "torch.ops.aten.no_such_op.default",
        ],
    )
    def test_targets(self, target: str) -> None:
        with pytest.raises(Unsafe):
            _check_target(target)

    @pytest.mark.parametrize(
        "target", ["torch.ops.aten.linear.default", "torch.sym_max", "_operator.floordiv", "math.ceil"]
    )
    def test_targets_that_pass(self, target: str) -> None:
        _check_target(target)

    def test_names_that_would_become_source(self, program: Path, tmp_path: Path, marker: Path) -> None:
        evil = f'x"), __import__("os").mkdir("{marker}"), ("'

        def keyword(graph: dict[str, Any]) -> None:
            nodes(graph)[0]["inputs"][0].update(name=evil, kind=2)

        def parameter(graph: dict[str, Any]) -> None:
            spec = next(s for s in graph["graph_module"]["signature"]["input_specs"] if "parameter" in s)
            spec["parameter"]["parameter_name"] = evil

        for change in (keyword, parameter):
            without_code(marker, tampered(program, tmp_path / "m.pt2", graph_edit(change)), "could run code")

    def test_guards_are_dropped(self, program: Path, tmp_path: Path, marker: Path) -> None:
        code = [f"__import__('os').mkdir('{marker}') or True"]
        path = tampered(program, tmp_path / "m.pt2", graph_edit(lambda g: g.update(guards_code=code)))
        opened = open_model(path)
        opened.outputs(opened.module, {"x": torch.zeros(3, 4)})  # type: ignore[arg-type]
        assert not marker.exists()

    def test_debug_information_is_dropped(self, program: Path, tmp_path: Path, marker: Path) -> None:
        def change(graph: dict[str, Any]) -> None:
            nodes(graph)[0]["metadata"] = {
                "source_fn_stack": "x,torch.os.mkdir",
                "custom": "not json",
                "stack_trace": "secret",
            }

        opened = open_model(tampered(program, tmp_path / "m.pt2", graph_edit(change)))
        assert b"secret" not in opened.extra["graph"] and not marker.exists()

    @pytest.mark.parametrize("kind", ["torch.nn.Module", "collections.namedtuple", "collections.deque"])
    def test_structures(self, program: Path, tmp_path: Path, kind: str) -> None:
        def change(graph: dict[str, Any]) -> None:
            signature = graph["graph_module"]["module_call_graph"][0]["signature"]
            signature["out_spec"] = json.dumps([1, {"type": kind, "context": "null", "children_spec": []}])

        refused(tampered(program, tmp_path / "m.pt2", graph_edit(change)), kind)

    def test_a_member_twice(self, program: Path, tmp_path: Path) -> None:
        path = tampered(program, tmp_path / "m.pt2", lambda m: None)
        with zipfile.ZipFile(path, "a") as z, pytest.warns(UserWarning, match="Duplicate"):
            z.writestr(next(n for n in z.namelist() if n.endswith("models/model.json")), b"{}")
        refused(path, "no member twice")

    def test_weights_beyond_their_bytes(self, program: Path, tmp_path: Path) -> None:
        def grow(members: dict[str, bytes]) -> None:
            table = json.loads(members["data/weights/model_weights_config.json"])
            table["config"]["fc.weight"]["tensor_meta"]["sizes"] = [{"as_int": 3}, {"as_int": 4000}]
            members["data/weights/model_weights_config.json"] = json.dumps(table).encode()

        refused(tampered(program, tmp_path / "m.pt2", grow), "fc.weight")

        def cut(members: dict[str, bytes]) -> None:
            name = next(n for n in members if n.startswith("data/weights/weight_"))
            members[name] = members[name][:4]

        refused(tampered(program, tmp_path / "m.pt2", cut), "bytes")

    def test_missing_and_malformed_members(self, program: Path, tmp_path: Path) -> None:
        for name in ("models/model.json", "data/weights/model_weights_config.json", "data/weights/weight_0"):
            refused(tampered(program, tmp_path / "m.pt2", lambda m, name=name: m.pop(name) and None))  # type: ignore[misc]
        for data in (b"", b"[]", b"{}", b"{" * 5000, b'{"graph_module": 3}'):
            refused(tampered(program, tmp_path / "m.pt2", lambda m, data=data: m.update({"models/model.json": data})))  # type: ignore[misc]

    def test_not_finite(self, tmp_path: Path) -> None:
        module = Small().eval()
        module.fc.bias.data[1] = torch.nan
        torch.export.save(torch.export.export(module, (torch.randn(2, 4),)), tmp_path / "m.pt2")
        refused(tmp_path / "m.pt2", "fc.bias", "1 NaN")

    def test_a_hostile_graph_in_a_checkpoint(self, program: Path, tmp_path: Path, marker: Path) -> None:
        spec = describe(open_model(program), tmp_path)
        tampered(
            tmp_path / "graph.pt2", tmp_path / "evil.pt2", graph_edit(lambda g: nodes(g).insert(0, system_node(marker)))
        )
        (tmp_path / "evil.pt2").rename(tmp_path / "graph.pt2")
        with pytest.raises(ModelError, match=r"torch\.os\.mkdir"):
            skeleton(spec, tmp_path)
        assert not marker.exists()


class TestHuggingFace:
    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        folder = tmp_path / "hf"
        folder.mkdir()
        save_file({"w.weight": torch.ones(2, 2)}, folder / "model.safetensors")
        return folder

    def test_auto_map_is_refused(self, folder: Path, marker: Path) -> None:
        (folder / "modeling.py").write_text(f"import os\nos.mkdir({str(marker)!r})\n")
        config = {"architectures": ["Evil"], "model_type": "bert", "auto_map": {"AutoModel": "modeling.Evil"}}
        (folder / "config.json").write_text(json.dumps(config))
        without_code(marker, folder, "auto_map", "--trust-remote-code")

    @pytest.mark.parametrize(
        "config",
        [
            {"architectures": ["os"]},
            {"architectures": ["pipeline"]},
            {"architectures": ["PreTrainedModel"]},
            {"architectures": ["NoSuchModel"]},
            {"architectures": ["__import__('os')"]},
            {"architectures": []},
            {"model_type": "bert"},
            [],
            {"architectures": [3]},
            {"architectures": ["BertModel"], "hidden_size": "many"},
            {"architectures": ["BertModel"], "quantization_config": {"bits": 4}},
        ],
    )
    def test_configurations_that_name_no_model(self, folder: Path, config: Any) -> None:
        (folder / "config.json").write_text(json.dumps(config))
        refused(folder)

    def test_broken_configuration_and_missing_weights(self, folder: Path) -> None:
        (folder / "config.json").write_text("{")
        refused(folder, "config.json")
        (folder / "config.json").write_text(json.dumps({"architectures": ["BertModel"], "hidden_size": 8}))
        (folder / "model.safetensors").unlink()
        refused(folder, "model.safetensors")

    def test_planted_pickle_in_a_folder(self, folder: Path, marker: Path) -> None:
        (folder / "config.json").write_text(json.dumps({"architectures": ["BertModel"]}))
        (folder / "model.safetensors").unlink()
        torch.save({"w": Planted(marker)}, folder / "pytorch_model.bin")
        without_code(marker, folder, "mkdir")


class TestNoModels:
    @pytest.mark.parametrize(
        ("data", "says"),
        [
            (b"", "an empty file"),
            (b"hello\nworld\n", "a text file"),
            (b"PK\x03\x04rest", "end is missing"),
            (os.urandom(0) + b"\xff\xfe\x00" * 90, "no format"),
            (b"\x89HDF\r\n\x1a\n" + b"\0" * 64, "HDF5"),
            (b"\x08\x0a\x12\x07pytorch", "an ONNX file"),
            (b"\x1c\0\0\0TFL3" + b"\0" * 64, "TensorFlow Lite"),
            (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"),
            (b'{"weight_map": {}}', "weight_map"),
            (b"{}", "a text file"),
            (b"\x80\x02.", "torch file"),
            (b"\x80", "torch file"),
            (struct.pack("<Q", 10) + b"{not json}", "safetensors"),
            (struct.pack("<Q", 10**7) + b"{}", "safetensors"),
        ],
    )
    def test_bytes(self, tmp_path: Path, data: bytes, says: str) -> None:
        (tmp_path / "m.pt").write_bytes(data)
        refused(tmp_path / "m.pt", "m.pt", says)
        refused(tmp_path / "m.pt", trust_pickle=True)

    def test_a_zip_that_is_no_checkpoint(self, tmp_path: Path) -> None:
        for members in ({"readme.txt": b"x"}, {}, {"a/data.pkl": b"nonsense"}, {"a/data.pkl": b""}):
            with zipfile.ZipFile(tmp_path / "m.pt", "w") as z:
                for name, data in members.items():
                    z.writestr(name, data)
            refused(tmp_path / "m.pt")

    @pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors", "pt2"])
    def test_truncated_anywhere(self, tmp_path: Path, program: Path, kind: str) -> None:
        state = {"a.weight": torch.randn(16, 16), "b.weight": torch.randn(8)}
        whole = tmp_path / "whole"
        if kind == "safetensors":
            save_file(state, whole)
        elif kind == "pt2":
            whole = program
        else:
            torch.save(state, whole, _use_new_zipfile_serialization=kind == "zip")
        data = whole.read_bytes()
        for cut in (1, 4, 7, 9, 64, len(data) // 3, len(data) // 2, len(data) - 200, len(data) - 1):
            (tmp_path / "cut.pt").write_bytes(data[:cut])
            refused(tmp_path / "cut.pt", "cut.pt")

    def test_missing_and_empty_places(self, tmp_path: Path) -> None:
        refused(tmp_path / "nowhere.pt", "no such file")
        refused(tmp_path, "an empty folder")
        (tmp_path / "a.txt").write_text("x")
        refused(tmp_path, "a.txt")
        refused(Path("/dev/null"), "an empty file")

    def test_our_own_output_is_not_a_source(self, tmp_path: Path) -> None:
        (tmp_path / "lrcompress.json").write_text(json.dumps({"made_by": "lrcompress factorize"}))
        refused(tmp_path, "lrcompress factorize", "original")

    @pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
    def test_not_finite(self, tmp_path: Path, value: float) -> None:
        state = {"a.weight": torch.ones(4, 4), "b.weight": torch.ones(4)}
        state["b.weight"][2] = value
        save_file(state, tmp_path / "m.safetensors")
        refused(tmp_path / "m.safetensors", "b.weight", "finite")

    def test_integers_only(self, tmp_path: Path) -> None:
        torch.save({"a.weight": torch.ones(4, 4, dtype=torch.int8)}, tmp_path / "m.pt")
        refused(tmp_path / "m.pt", "floating-point", "int8")


class TestCheckpointsThatNameCode:
    """A compressed checkpoint is data: the architecture it names must not become a way to run anything."""

    def spec(self, arch: dict[str, Any]) -> dict[str, Any]:
        return {"kind": "module", "inputs": [], "arch": arch}

    @pytest.mark.parametrize(
        "name",
        ["os:mkdir", "subprocess:run", "torch:load", "torch.hub:load", "numpy:load", "shutil:rmtree", "builtins:exec"],
    )
    def test_functions_of_the_system(self, tmp_path: Path, marker: Path, name: str) -> None:
        with pytest.raises(ModelError, match="own package"):
            skeleton(self.spec({"spec": name, "args": {"path": str(marker)}, "digest": "0" * 64}), tmp_path)
        assert not marker.exists()

    def test_a_file_inside_the_checkpoint(self, tmp_path: Path, marker: Path) -> None:
        from lrcompress.files import sha256_file

        (tmp_path / "net.py").write_text(f"import os\nos.mkdir({str(marker)!r})\n")
        arch = {"spec": "net.py:f", "relative": "net.py:f", "args": {}, "digest": sha256_file(tmp_path / "net.py")}
        with pytest.raises(ModelError, match="must not bring code"):
            skeleton(self.spec(arch), tmp_path)
        assert not marker.exists()

    @pytest.mark.parametrize(
        "spec", [None, [], {}, {"kind": "other", "inputs": []}, {"kind": "module"}, {"kind": "module", "inputs": [3]}]
    )
    def test_malformed(self, tmp_path: Path, spec: Any) -> None:
        with pytest.raises(ModelError):
            skeleton(spec, tmp_path)

    def test_remote_code_is_not_rebuilt(self, tmp_path: Path) -> None:
        with pytest.raises(ModelError, match="foreign code"):
            skeleton({"kind": "huggingface", "inputs": [], "extra": {"remote_code": True}}, tmp_path)
