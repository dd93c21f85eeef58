"""Programs and TorchScript are factorized in their graph, come back without their source, and export with factors apart."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lrcompress
from lrcompress.cli.main import run
from lrcompress.data import Data
from lrcompress.errors import ModelError
from lrcompress.model import InputSpec, open_model
from lrcompress.model.checkpoint import load_compressed
from lrcompress.model.surgery import factorized_layers
from tests.support.nets import images, small, words

SPEC = (InputSpec("x", "float32", ("batch", 3, 8, 8)),)


class Functional(nn.Module):
    """Not one layer module: weights are parameters and a buffer, one stored (in, out), one bias computed."""

    def __init__(self) -> None:
        super().__init__()
        g = torch.Generator().manual_seed(0)
        new = lambda *s: nn.Parameter(torch.randn(*s, generator=g) / s[-1] ** 0.5)  # noqa: E731
        self.kernel, self.kernel_bias = new(16, 3, 3, 3), new(16)
        self.block = nn.Module()
        self.block.w1, self.block.b1, self.block.weight = new(64, 256), new(64), new(64, 48)
        self.register_buffer("w3", new(40, 48).detach())
        self.b3, self.last = new(40), new(5, 40)

    def forward(self, x):
        x = F.relu(F.conv2d(x, self.kernel, self.kernel_bias, stride=2, padding=1)).mul(1.5)
        x = F.relu(F.linear(x.flatten(1).repeat(1, 1), self.block.w1, self.block.b1))
        x = F.relu(x @ self.block.weight)
        x = F.relu(F.linear(x, self.w3, torch.tanh(self.b3)))
        return F.linear(x, self.last)


def functional() -> nn.Module:
    return Functional().eval()


def program(net, path, decomposed=False):
    exported = torch.export.export(
        net, (torch.as_tensor(images(4)[0]),), dynamic_shapes=({0: torch.export.Dim("batch")},)
    )
    torch.export.save(exported.run_decompositions() if decomposed else exported, path)
    return path


@pytest.mark.parametrize("decomposed", [False, True])
def test_functional_calls_are_layers(tmp_path, decomposed):
    net, path = functional(), program(functional(), tmp_path / "m.pt2", decomposed)
    x = torch.as_tensor(images(9, 5)[0])
    opened = open_model(path)
    torch.testing.assert_close(opened.outputs(opened.module, {"x": x})["output"], net(x), rtol=1e-5, atol=1e-6)
    layers = {n: m for n, m in opened.module.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)}
    assert set(layers) == {"kernel", "block.w1", "block", "w3", "last"} or set(layers) == {
        "kernel",
        "block.w1",
        "block.weight",
        "w3",
        "last",
    }
    for name, shape in (("kernel", (16, 3, 3, 3)), ("block.w1", (64, 256)), ("w3", (40, 48)), ("last", (5, 40))):
        assert tuple(layers[name].weight.shape) == shape
    turned = next(m for n, m in layers.items() if n in ("block", "block.weight"))
    assert tuple(turned.weight.shape) == (48, 64), "stored as (in, out), held as a layer holds it"


@pytest.mark.parametrize("source", [small, functional], ids=["modules", "functional"])
@pytest.mark.parametrize("decomposed", [False, True], ids=["traced", "decomposed"])
def test_a_program_goes_all_the_way(source, decomposed, tmp_path, monkeypatch):
    """As typed: factorize with data, load without the source, export with every factor a constant of its own."""
    monkeypatch.chdir(tmp_path)
    path = program(source(), tmp_path / "model.pt2", decomposed)
    np.savez("x.npz", x=images(64)[0])
    for command in ("factorize model.pt2 --rank 6 --calib x.npz", "export --target onnx"):
        assert run(command.split()) == 0
    opened, back = open_model(path), load_compressed(tmp_path / "compressed")
    factors = {n: m.form for n, m in factorized_layers(back.module)}
    assert len(factors) >= 3
    assert {layer["norm"] for layer in back.spec["report"]["layers"] if layer["form"] != "dense"} == {"two_sided"}
    graph = onnx.load("exported/model.onnx", load_external_data=False).graph
    constants = {t.name for t in graph.initializer}
    assert {f"{n}.{f}" for n, m in factorized_layers(back.module) for f in m.factors} <= constants
    plain = lrcompress.factorize(opened, rank=6).model
    x = torch.as_tensor(images(200, 3)[0])
    exact = source()(x)
    error = lambda m: float((m(x) - exact).detach().norm() / exact.detach().norm())  # noqa: E731
    assert error(back.module) < 0.9 * error(plain), "weighted by activations, it answers better on new data"


def test_the_graph_and_the_modules_become_the_same_factors(tmp_path):
    calib = Data.of_arrays({"x": images(64)[0]})
    one = lrcompress.factorize(small(), rank=4, calib=calib, inputs=SPEC, anchor=False)
    for decomposed in (False, True):
        two = lrcompress.factorize(program(small(), tmp_path / "m.pt2", decomposed), rank=4, calib=calib, anchor=False)
        x = torch.as_tensor(images(6)[0])
        torch.testing.assert_close(two.model(x), one.model(x), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("how", ["traced", "scripted", "frozen"])
def test_torchscript_is_converted(tmp_path, how, monkeypatch):
    monkeypatch.chdir(tmp_path)
    net = small()
    script = torch.jit.trace(net, torch.as_tensor(images(3)[0])) if how == "traced" else torch.jit.script(net)
    (torch.jit.freeze(script.eval()) if how == "frozen" else script).save("model.pt")
    np.savez("x.npz", x=images(64)[0])
    typed = "factorize model.pt --rank 4 --calib x.npz --trust-pickle --input x:float32:batch,3,8,8"
    for command in (typed, "export --target onnx --slots none"):
        assert run(command.split()) == 0
    back = load_compressed(tmp_path / "compressed")
    assert len(list(factorized_layers(back.module))) >= 3 and back.spec["source"]["kind"] == "torchscript"
    assert back.open_original(trust_pickle=True).digest == back.spec["source"]["digest"]
    opened = open_model(tmp_path / "model.pt", inputs=SPEC, trust_pickle=True)
    x = torch.as_tensor(images(7)[0])
    torch.testing.assert_close(opened.outputs(opened.module, {"x": x})["output"], net(x), rtol=1e-4, atol=1e-5)


def test_torchscript_of_two_inputs_and_in_memory():
    net = words()
    script = torch.jit.script(net)
    specs = (InputSpec("attention_mask", "int64", ("b", "s")), InputSpec("ids", "int64", ("b", "s")))
    with pytest.raises(ModelError, match="--input"):
        open_model(script)
    with pytest.raises(ModelError, match="named ids, attention_mask"):
        open_model(script, inputs=(*specs[:1], InputSpec("idz", "int64", ("b", "s"))))
    opened = open_model(script, inputs=specs)
    assert [s.name for s in opened.inputs] == ["ids", "attention_mask"]
    ids, mask = torch.randint(0, 40, (5, 9)), torch.ones(5, 9, dtype=torch.long)
    found = opened.outputs(opened.module, {"ids": ids, "attention_mask": mask})["output"]
    torch.testing.assert_close(found, net(ids, mask))


def test_torchscript_that_cannot_be_converted_says_what_to_do(tmp_path):
    @torch.jit.script
    def loop(x: torch.Tensor) -> torch.Tensor:
        while bool(x.sum() > 1):
            x = x / 2
        return x

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(3, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return loop(self.fc(x))

    torch.jit.script(Net()).save(str(tmp_path / "m.pt"))
    with pytest.raises(ModelError, match=r"torch\.export.*--arch") as e:
        open_model(tmp_path / "m.pt", inputs=(InputSpec("x", "float32", ("n", 3)),), trust_pickle=True)
    assert "\n" not in str(e.value)
