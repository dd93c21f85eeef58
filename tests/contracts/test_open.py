"""Every kind of source opens to the same network; names, digests, inputs and outputs are as promised."""

from __future__ import annotations

import argparse
import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor, nn

from lrcompress.errors import CommandError, LrcompressWarning, ModelError
from lrcompress.model import InputSpec, check_finite, clean_state_dict, describe, open_model, parse_input, skeleton
from lrcompress.model.arch import _reachable
from lrcompress.model.inputs import DTYPES
from tests.support.pretrained import assets

ROOT = Path(__file__).resolve().parents[2]
RESNET = f"{ROOT / 'recipes/archs/cifar_resnet.py'}:resnet20"
X = parse_input("x:float32:batch,6")

NET = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, width=8, bias=True):
        super().__init__()
        self.first = nn.Linear(6, width, bias=bias)
        self.norm = nn.BatchNorm1d(width)
        self.last = nn.Linear(width, 3)

    def forward(self, x):
        return self.last(torch.relu(self.norm(self.first(x))))

def fails():
    raise OSError("no such thing")

def number():
    return 3

constant = 4
"""


@pytest.fixture
def arch(tmp_path: Path) -> str:
    (tmp_path / "net.py").write_text(NET)
    return f"{tmp_path / 'net.py'}:Net"


@pytest.fixture
def net(arch: str) -> nn.Module:
    from lrcompress.model.arch import build

    torch.manual_seed(3)
    module, _ = build(arch)
    for p in module.parameters():
        nn.init.normal_(p)
    return module.eval()


def export(module: nn.Module, path: Path, example: tuple[Any, ...], shapes: Any) -> Path:
    torch.export.save(torch.export.export(module, example, dynamic_shapes=shapes), path)
    return path


class TestSameNetworkFromEverySource:
    def test_five_files_one_digest_and_equal_outputs(self, net: nn.Module, arch: str, tmp_path: Path) -> None:
        state = net.state_dict()
        torch.save(state, tmp_path / "zip.pt")
        torch.save(state, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
        torch.save({"epoch": 3, "model_state_dict": state, "opt": argparse.Namespace(lr=0.1)}, tmp_path / "nested.bin")
        save_file(dict(state), tmp_path / "plain.safetensors")
        save_file(dict(state), tmp_path / "misnamed.pt")
        x = torch.randn(5, 6)
        expected = net(x)
        digests = set()
        for name in ("zip.pt", "old.pth", "nested.bin", "plain.safetensors", "misnamed.pt"):
            bare = open_model(tmp_path / name)
            assert bare.kind == "state_dict" and bare.module is None and bare.tensors is not None
            opened = open_model(tmp_path / name, arch=arch, inputs=[X])
            assert (opened.kind, opened.tensors, opened.inputs) == ("module", None, (X,))
            assert opened.module is not None and not opened.module.training
            assert torch.equal(opened.outputs(opened.module, {"x": x})["output"], expected)
            digests |= {bare.digest, opened.digest}
        assert digests == {open_model(net).digest}

    def test_program_module_and_trusted_pickle_answer_alike(self, net: nn.Module, tmp_path: Path) -> None:
        x = torch.randn(5, 6)
        expected = net(x)
        path = export(net, tmp_path / "net.pt2", (torch.randn(2, 6),), ({0: torch.export.Dim("n")},))
        program = open_model(path)
        assert program.kind == "pt2" and program.inputs == (X,)
        assert torch.allclose(program.outputs(program.module, {"x": x})["output"], expected, atol=1e-6)
        live = open_model(net)
        assert live.kind == "module" and live.path is None and live.arch is None and live.module is net
        torch.save(nn.Sequential(nn.Linear(6, 2)), tmp_path / "pickled.pt")
        pickled = open_model(tmp_path / "pickled.pt", trust_pickle=True)
        assert pickled.kind == "pickled_module" and isinstance(pickled.module, nn.Sequential)

    def test_shards_and_whole_file_agree(self, net: nn.Module, tmp_path: Path) -> None:
        state = net.state_dict()
        names = sorted(state)
        parts = {"a.safetensors": names[:3], "b.bin": names[3:]}
        save_file({k: state[k] for k in parts["a.safetensors"]}, tmp_path / "a.safetensors")
        torch.save({k: state[k] for k in parts["b.bin"]}, tmp_path / "b.bin")
        index = {"weight_map": {k: f for f, ks in parts.items() for k in ks}}
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
        assert open_model(tmp_path / "model.safetensors.index.json").digest == open_model(net).digest
        assert open_model(tmp_path).digest == open_model(net).digest
        (tmp_path / "b.bin").unlink()
        with pytest.raises(ModelError, match=r"b\.bin"):
            open_model(tmp_path)
        index["weight_map"][names[0]] = "../a.safetensors"
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
        with pytest.raises(ModelError, match="beside the index"):
            open_model(tmp_path)

    def test_digest_sees_names_dtypes_shapes_and_every_byte(self) -> None:
        base = {"a.weight": torch.arange(6.0).reshape(2, 3)}
        changed = torch.arange(6.0).reshape(2, 3)
        changed[1, 2] += 1e-6
        variants = [
            {"b.weight": base["a.weight"]},
            {"a.weight": base["a.weight"].reshape(3, 2)},
            {"a.weight": base["a.weight"].half()},
            {"a.weight": changed},
            {**base, "c": torch.zeros(0)},
        ]
        from lrcompress.model import digest_tensors

        assert len({digest_tensors(v) for v in (base, *variants)}) == len(variants) + 1
        assert digest_tensors(base) == digest_tensors({"a.weight": base["a.weight"].T.contiguous().T})


class TestStateDicts:
    @pytest.mark.parametrize("key", ["state_dict", "model", "model_state_dict", "ema"])
    @pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod."])
    def test_nested_and_wrapped(self, key: str, prefix: str) -> None:
        state = {f"{prefix}{n}": torch.ones(2) for n in ("a", "b")}
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            assert sorted(clean_state_dict({key: state, "epoch": 1})) == ["a", "b"]
        assert [prefix in str(w.message) for w in seen if w.category is LrcompressWarning] == [True] * bool(prefix)

    def test_a_prefix_that_not_all_share_stays(self) -> None:
        state = {"module.a": torch.ones(1), "b": torch.ones(1)}
        assert sorted(clean_state_dict(state)) == ["b", "module.a"]

    @pytest.mark.parametrize(
        "obj", [[], 3, {}, {"a": 1}, {"state_dict": {}}, {"model": {"a": "b"}}, {1: torch.ones(1)}, torch.ones(2)]
    )
    def test_anything_else_is_refused(self, obj: Any) -> None:
        with pytest.raises(ModelError, match=r"state_dict\|model\|model_state_dict\|ema"):
            clean_state_dict(obj)

    def test_inert_types_of_real_checkpoints_open(self, tmp_path: Path) -> None:
        extras = {
            "args": argparse.Namespace(lr=0.1, out=Path("runs/1")),
            "best": np.float64(0.5),
            "n": np.int64(3),
            "hist": np.arange(3.0),
            "names": np.array(["a", "b"]),
            "size": torch.Size([2]),
        }
        for new in (True, False):
            torch.save(
                {"state_dict": {"w": torch.ones(2, 2)}, **extras}, tmp_path / "c.pt", _use_new_zipfile_serialization=new
            )
            assert list(open_model(tmp_path / "c.pt").tensors or ()) == ["w"]


class TestArch:
    def test_arguments_reach_the_factory(self, arch: str, tmp_path: Path) -> None:
        from lrcompress.model.arch import build

        module, _ = build(arch, {"width": 5})
        save_file(dict(module.state_dict()), tmp_path / "m.safetensors")
        opened = open_model(tmp_path / "m.safetensors", arch=arch, arch_args={"width": 5})
        assert opened.arch is not None and opened.arch["args"] == {"width": 5}
        with pytest.raises(ModelError, match=r"shape first\.bias \(5,\) instead of \(8,\)") as caught:
            open_model(tmp_path / "m.safetensors", arch=arch)
        assert caught.value.exit_code == 4 and "--arch" in caught.value.remedy

    def test_mismatch_names_the_tensors(self, net: nn.Module, arch: str, tmp_path: Path) -> None:
        state = dict(net.state_dict())
        state["extra.weight"] = state.pop("last.weight")
        save_file(state, tmp_path / "m.safetensors")
        with pytest.raises(ModelError, match=r"missing last\.weight; unexpected extra\.weight"):
            open_model(tmp_path / "m.safetensors", arch=arch)

    @pytest.mark.parametrize(
        ("spec", "reason"),
        [
            ("nowhere.py:Net", "no such file"),
            ("not_a_package.mod:f", "ModuleNotFoundError"),
            ("{dir}/net.py:missing", "nothing of that name"),
            ("{dir}/net.py:constant", "a int"),
            ("{dir}/net.py:number", "a int"),
            ("{dir}/net.py:fails", "OSError: no such thing"),
            ("{dir}/net.py", "expected pkg.mod:callable"),
            ("{dir}/broken.py:f", "SyntaxError"),
        ],
    )
    def test_what_cannot_be_used_says_why(
        self, arch: str, net: nn.Module, tmp_path: Path, spec: str, reason: str
    ) -> None:
        (tmp_path / "broken.py").write_text("def f(:\n")
        save_file(dict(net.state_dict()), tmp_path / "m.safetensors")
        with pytest.raises(ModelError) as caught:
            open_model(tmp_path / "m.safetensors", arch=spec.format(dir=tmp_path))
        assert reason in str(caught.value) and "\n" not in str(caught.value)

    def test_import_path_is_left_as_it_was(self, tmp_path: Path) -> None:
        import sys

        before = list(sys.path)
        with _reachable(tmp_path):
            assert sys.path[-1] == str(tmp_path)
        assert sys.path == before

    def test_counters_may_be_missing_other_buffers_not(self, net: nn.Module, arch: str, tmp_path: Path) -> None:
        state = {k: v for k, v in net.state_dict().items() if not k.endswith("num_batches_tracked")}
        save_file(state, tmp_path / "m.safetensors")
        assert open_model(tmp_path / "m.safetensors", arch=arch).kind == "module"
        del state["norm.running_mean"]
        save_file(state, tmp_path / "m.safetensors")
        with pytest.raises(ModelError, match=r"missing norm\.running_mean"):
            open_model(tmp_path / "m.safetensors", arch=arch)


class TestOutputs:
    @pytest.mark.parametrize(
        ("answer", "names"),
        [
            (lambda t: t, ["output"]),
            (lambda t: (t, t + 1), ["output_0", "output_1"]),
            (lambda t: {"a": t, "n": 3, "b": t}, ["a", "b"]),
            (lambda t: (t, None, [t]), ["output_0", "output_2_0"]),
        ],
    )
    def test_names(self, answer: Any, names: list[str]) -> None:
        class Answering(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.w = nn.Parameter(torch.ones(1))

            def forward(self, x: Tensor) -> Any:
                return answer(x * self.w)

        opened = open_model(Answering())
        for key in ("x", "whatever"):  # a single input fits whatever its name
            assert list(opened.outputs(opened.module, {key: torch.ones(2)})) == names  # type: ignore[arg-type]

    def test_wrong_names_are_refused(self) -> None:
        class Two(nn.Linear):
            def forward(self, x: Tensor, scale: Tensor) -> Tensor:  # type: ignore[override]
                return super().forward(x) * scale

        opened = open_model(Two(2, 2))
        with pytest.raises(ModelError, match="arguments of forward: x, scale"):
            opened.outputs(opened.module, {"x": torch.ones(2), "sclae": torch.ones(1)})  # type: ignore[arg-type]


class Mixed(nn.Module):
    """Every layer that a program turns into a module, one weight used twice, one read directly."""

    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(11, 8, padding_idx=0)
        self.conv1 = nn.Conv1d(8, 6, 3, padding="same")
        self.conv2 = nn.Conv2d(1, 4, (2, 3), stride=(1, 2), padding=(1, 0), dilation=(1, 2), bias=False)
        self.depth = nn.Conv2d(4, 4, 3, groups=4)
        self.fc = nn.Linear(6, 8)
        self.twice = nn.Linear(8, 8, bias=False)
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.emb.weight
        self.register_buffer("scale", torch.tensor([2.0]), persistent=False)
        self.norm = nn.LayerNorm(8)

    def forward(self, ids: Tensor, image: Tensor) -> dict[str, Tensor]:
        h = self.conv1(self.emb(ids).transpose(1, 2)).mean(-1)
        h = self.norm(self.twice(self.twice(self.fc(h)))) * self.scale
        return {"logits": self.head(h), "map": self.depth(self.conv2(image)) * self.norm.weight.sum()}


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, Path]:
    torch.manual_seed(5)
    module = Mixed().eval()
    nn.init.normal_(module.norm.weight)
    example = (torch.ones(2, 9, dtype=torch.long), torch.randn(2, 1, 12, 12))
    n = torch.export.Dim("n")
    path = tmp_path_factory.mktemp("mixed") / "mixed.pt2"
    return module, export(module, path, example, ({0: n, 1: torch.export.Dim("t", min=4)}, {0: n}))


class TestPrograms:
    def test_layers_are_modules_under_their_names(self, mixed: tuple[nn.Module, Path]) -> None:
        module, path = mixed
        opened = open_model(path)
        assert opened.inputs == (parse_input("ids:int64:batch,dim1"), parse_input("image:float32:batch,1,12,12"))
        assert opened.module is not None
        layers = {
            n: m
            for n, m in opened.module.named_modules()
            if isinstance(m, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Embedding)
        }
        named = ("conv1", "conv2", "depth", "fc", "twice")
        for name in named:
            mine, theirs = layers[name], module.get_submodule(name)
            assert type(mine) is type(theirs) and repr(mine) == repr(theirs)
            assert torch.equal(mine.weight, theirs.weight)  # type: ignore[arg-type]
        first, second = (layers[n] for n in layers if n not in named)
        assert {type(first), type(second)} == {nn.Embedding, nn.Linear}
        assert first.weight is second.weight, "a tied output layer holds the same parameter as the embedding"
        assert {n for n, m in layers.items() if m is first or m is second} & {"emb", "head"}
        assert set(module.state_dict()) - {"head.weight", "emb.weight"} <= set(opened.module.state_dict())
        torch.manual_seed(0)
        inputs = {"ids": torch.randint(0, 11, (3, 7)), "image": torch.randn(3, 1, 12, 12)}
        expected = module(**inputs)
        found = opened.outputs(opened.module, inputs)
        assert list(found) == ["logits", "map"]
        for key, value in expected.items():
            assert torch.allclose(found[key], value, atol=1e-5)

    def test_hooks_see_every_call(self, mixed: tuple[nn.Module, Path]) -> None:
        opened = open_model(mixed[1])
        assert opened.module is not None
        seen: list[tuple[int, ...]] = []
        opened.module.get_submodule("twice").register_forward_hook(lambda m, i, o: seen.append(tuple(i[0].shape)))
        opened.outputs(opened.module, {"ids": torch.ones(2, 5, dtype=torch.long), "image": torch.zeros(2, 1, 12, 12)})
        assert seen == [(2, 8), (2, 8)]

    def test_skeleton_needs_only_the_weights(self, mixed: tuple[nn.Module, Path], tmp_path: Path) -> None:
        opened = open_model(mixed[1])
        spec = json.loads(json.dumps(describe(opened, tmp_path)))
        assert [p.name for p in tmp_path.iterdir()] == ["graph.pt2"]
        written = (tmp_path / "graph.pt2").read_bytes()
        assert b"sample_inputs/model.pt" in written and str(Path(__file__).name).encode() not in written, (
            "no source paths, no samples"
        )
        weight = opened.module.get_submodule("fc").weight.detach().numpy().tobytes()  # type: ignore[union-attr, operator]
        assert weight not in written
        again = skeleton(spec, tmp_path)
        assert again.module is not None and again.inputs == opened.inputs
        assert float(again.module.get_submodule("fc").weight.detach().abs().max()) == 0  # type: ignore[operator, arg-type]
        again.module.load_state_dict(opened.module.state_dict())  # type: ignore[union-attr]
        inputs = {"ids": torch.ones(2, 5, dtype=torch.long), "image": torch.randn(2, 1, 12, 12)}
        for key, value in opened.outputs(opened.module, inputs).items():  # type: ignore[arg-type]
            assert torch.equal(again.outputs(again.module, inputs)[key], value)
        describe(open_model(mixed[1]), tmp_path)
        assert (tmp_path / "graph.pt2").read_bytes() == written, "same program, same bytes"

    def test_digest_is_of_weights_and_graph(self, net: nn.Module, tmp_path: Path) -> None:
        shapes = ({0: torch.export.Dim("n")},)
        first = open_model(export(net, tmp_path / "a.pt2", (torch.randn(2, 6),), shapes)).digest
        assert open_model(export(net, tmp_path / "b.pt2", (torch.randn(4, 6),), shapes)).digest == first
        assert (
            open_model(
                export(nn.Sequential(net, nn.Tanh()).eval(), tmp_path / "c.pt2", (torch.randn(2, 6),), shapes)
            ).digest
            != first
        )
        with torch.no_grad():
            next(net.parameters())[0, 0] += 1
        assert open_model(export(net, tmp_path / "a.pt2", (torch.randn(2, 6),), shapes)).digest != first


class Odd(nn.Module):
    """An argument that is no tensor, a list, an einsum, a block without gradients, tensors that are no parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.weight = nn.Parameter(torch.randn(4, 4))
        self.constant = torch.randn(4)
        self.register_buffer("index", torch.tensor([3, 0, 1, 2]))

    def forward(self, x: Tensor, mask: Tensor | None, pair: list[Tensor], times: int = 2) -> Any:
        with torch.no_grad():
            y = self.layer(x) * times
        y = torch.einsum("bj,jk->bk", y, self.weight)[:, self.index] + self.constant
        return (y if mask is None else y * mask), {"second": self.layer(pair[0]) - pair[1]}


def test_programs_with_unusual_arguments(tmp_path: Path) -> None:
    module = Odd().eval()
    x, pair = torch.randn(2, 4), [torch.randn(2, 4), torch.randn(2, 4)]
    torch.export.save(torch.export.export(module, (x, None, pair, 3)), tmp_path / "odd.pt2")
    opened = open_model(tmp_path / "odd.pt2")
    assert [s.name for s in opened.inputs] == ["x", "pair_0", "pair_1"]
    found = opened.outputs(opened.module, {"x": x, "pair_0": pair[0], "pair_1": pair[1]})  # type: ignore[arg-type]
    first, second = module(x, None, pair, 3)
    assert torch.allclose(found["output_0"], first, atol=1e-6)
    assert torch.allclose(found["output_1.second"], second["second"], atol=1e-6)


class TestSkeleton:
    def test_architecture_moves_with_its_tree(self, net: nn.Module, tmp_path: Path) -> None:
        home = tmp_path / "home"
        (home / "archs").mkdir(parents=True)
        (home / "archs/net.py").write_text(NET)
        save_file(dict(net.state_dict()), home / "m.safetensors")
        opened = open_model(
            home / "m.safetensors", arch=f"{home}/archs/net.py:Net", arch_args={"bias": True}, inputs=[X]
        )
        (home / "compressed").mkdir()
        spec = json.loads(json.dumps(describe(opened, home / "compressed")))
        moved = home.rename(tmp_path / "moved")
        again = skeleton(spec, moved / "compressed")
        assert again.module is not None and again.inputs == (X,) and again.kind == "module"
        assert set(again.module.state_dict()) == set(net.state_dict())
        assert again.arch is not None and again.arch["args"] == {"bias": True}
        assert (
            open_model(moved / "m.safetensors", arch=again.arch["spec"], arch_args=again.arch["args"]).digest
            == opened.digest
        )
        (moved / "archs/net.py").write_text(NET + "\n# another\n")
        with pytest.raises(ModelError, match="another source"):
            skeleton(spec, moved / "compressed")
        (moved / "archs/net.py").unlink()
        with pytest.raises(ModelError, match="no such file"):
            skeleton(spec, moved / "compressed")

    def test_a_module_from_memory_is_recorded_and_cannot_be_rebuilt(
        self, net: nn.Module, arch: str, tmp_path: Path
    ) -> None:
        spec = describe(open_model(net), tmp_path)
        assert spec["kind"] == "object"
        with pytest.raises(ModelError, match="came from memory"):
            skeleton(spec, tmp_path)
        (tmp_path / "c").mkdir()
        named = describe(open_model(net, arch=arch), tmp_path / "c")
        assert skeleton(named, tmp_path / "c").module is not None

    def test_a_bare_state_dict_stays_bare(self, net: nn.Module, tmp_path: Path) -> None:
        save_file(dict(net.state_dict()), tmp_path / "m.safetensors")
        again = skeleton(describe(open_model(tmp_path / "m.safetensors"), tmp_path), tmp_path)
        assert again.kind == "state_dict" and again.module is None


@pytest.mark.assets
def test_pretrained_resnet_from_both_files_is_one_network_and_is_right() -> None:
    folder = assets() / "models" / "resnet20_cifar10"
    plain = open_model(folder / "model.safetensors", arch=RESNET)
    with pytest.warns(LrcompressWarning, match="module"):
        original = open_model(folder / "resnet20-12fca82f.th", arch=RESNET)
    data = np.load(folder.parents[1] / "data/cifar10_test_a.npz")
    images = torch.from_numpy(data["x"][:200]).permute(0, 3, 1, 2).float() / 255
    images = (images - torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)) / torch.tensor([0.229, 0.224, 0.225]).view(
        3, 1, 1
    )
    with torch.no_grad():
        logits = plain.outputs(plain.module, {"x": images})["output"]  # type: ignore[arg-type]
        assert torch.equal(original.outputs(original.module, {"x": images})["output"], logits)  # type: ignore[arg-type]
    assert (
        float((logits.argmax(1).numpy() == data["y"][:200]).mean()) > 0.86
    )  # 91.5 % on all, 2.7 standard errors below


class TestFiniteness:
    def test_the_tensor_is_named_and_masks_may_be_infinite(self) -> None:
        check_finite(
            {"a": torch.ones(2), "causal_mask": torch.tensor([0.0, -torch.inf]), "n": torch.ones(2, dtype=torch.long)}
        )
        for bad in (torch.nan, torch.inf, -torch.inf):
            with pytest.raises(ModelError, match=r"m\.pt: b\.weight"):
                check_finite({"a": torch.ones(2), "b.weight": torch.tensor([0.0, bad])}, "m.pt")
        with pytest.raises(ModelError):
            check_finite({"causal_mask": torch.tensor([torch.nan])})


names = st.from_regex(r"[A-Za-z_][A-Za-z0-9_]{0,12}", fullmatch=True)
words = st.sampled_from(["batch", "sequence", "n", "T_1"])


class TestParseInput:
    @settings(max_examples=60, deadline=None)
    @given(names, st.sampled_from(DTYPES), st.lists(st.integers(1, 10**6) | words, max_size=5))
    def test_text_and_spec_are_inverse(self, name: str, dtype: str, shape: list[int | str]) -> None:
        spec = InputSpec(name, dtype, tuple(shape))
        assert parse_input(str(spec)) == spec

    @settings(max_examples=120, deadline=None)
    @given(
        st.text(max_size=30)
        | st.builds(":".join, st.lists(st.text("abx019,:. -\n", max_size=6), min_size=2, max_size=4))
    )
    def test_any_text_is_a_spec_or_one_line(self, text: str) -> None:
        try:
            spec = parse_input(text)
        except CommandError as e:
            assert "\n" not in str(e) and e.exit_code == 2
        else:
            assert parse_input(str(spec)) == spec and all(isinstance(d, str) or d > 0 for d in spec.shape)

    @pytest.mark.parametrize(
        "text",
        [
            "x",
            "x:float32",
            "x:float:3",
            "x:float32:0",
            "x:float32:-1",
            "x:float32:3,,3",
            "1x:float32:3",
            "x:float32:3.5",
            "x:int64:lambda",
        ],
    )
    def test_wrong_texts(self, text: str) -> None:
        with pytest.raises(CommandError):
            parse_input(text)

    def test_a_near_dtype_is_suggested(self) -> None:
        with pytest.raises(CommandError, match="did you mean float32"):
            parse_input("x:flaot32:3")
