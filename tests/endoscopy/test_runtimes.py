"""Exported networks compute what PyTorch computes, for any number of frames, without gates."""

import json
from collections import Counter
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

from core_gates.errors import MissingExtraError
from endoscopy.bundles.sizing_bundle import SizingBundle
from endoscopy.models.sizer import fold, fsg_resnet18, fsg_vit, tiny_resnet, tiny_vit
from endoscopy.runtimes import (
    PositionalSizer,
    export_onnx,
    export_program,
    exportable,
    save_program,
)
from endoscopy.training.targets import LogSize

STREAMS = {"rgb_mask": 4, "crop": 3, "rgb": 3, "loc": 3, "depth": 1}


def network(make, gates="fsg", geometry=False, streams=("rgb_mask",)):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return make(streams=streams, gates=gates, geometry=geometry).eval()


def example(streams=("rgb_mask",), geometry=False, count=2, seed=1):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(count, STREAMS[name], 64, 64) for name in streams] + [(count, 4)] * geometry
    return [torch.randn(shape, generator=generator) for shape in shapes]


def operators(program):
    """How often an exported program calls each operator."""
    nodes = (node for node in program.graph.nodes if node.op == "call_function")
    return Counter(str(node.target) for node in nodes)


CASES = {
    "vit": (tiny_vit, ("rgb_mask",), False),
    "resnet of two streams with geometry": (tiny_resnet, ("rgb_mask", "crop"), True),
    "resnet-18 of three streams": (fsg_resnet18, ("rgb", "loc", "depth"), False),
    "vit with SwiGLU": (
        partial(
            fsg_vit,
            "eva02_tiny_patch14_224",
            trunk_options={"img_size": 64, "patch_size": 16, "depth": 2},
        ),
        ("rgb",),
        False,
    ),
    "convnext": (partial(fsg_vit, "convnext_atto"), ("rgb",), False),
}
LARGE = (
    "resnet of two streams with geometry",
    "resnet-18 of three streams",
    "vit with SwiGLU",
    "convnext",
)


@pytest.mark.costly("ONNX is exported")
@pytest.mark.parametrize(
    "case",
    [pytest.param(name, marks=[pytest.mark.slow] * (name in LARGE)) for name in CASES],
)
def test_onnxruntime_agrees_with_the_gated_network(case, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    make, streams, geometry = CASES[case]
    gated = network(make, geometry=geometry, streams=streams)
    wrapped, tensors, metadata = exportable(SizingBundle(gated, LogSize(), 64))
    path = export_onnx(wrapped, tensors, tmp_path / "a.onnx", metadata)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    assert [node.name for node in session.get_inputs()] == list(wrapped.names)
    for count in (1, 3):
        tensors = example(streams, geometry, count, seed=2)
        inputs = dict(zip(wrapped.names, (t.numpy() for t in tensors), strict=True))
        with torch.no_grad():
            expected = gated(dict(zip(streams, tensors, strict=False)), tensors[-1])
        found = session.run(["raw"], inputs)[0]
        np.testing.assert_allclose(found, expected.numpy(), rtol=1e-4, atol=1e-5)
    properties = session.get_modelmeta().custom_metadata_map
    found = {name: json.loads(value) for name, value in properties.items()}
    facts = found["scope"]["calibrated_for"], found["target"]["name"], found["intended_use"]
    assert facts == (["synthetic"], "LogSize", "research only")
    assert found["normalization"]["mean"] == [0.3224, 0.2263, 0.1750]
    assert [file.name for file in tmp_path.iterdir()] == ["a.onnx"]


@pytest.mark.parametrize("make", [tiny_resnet, tiny_vit])
def test_a_folded_network_has_the_operators_of_a_plain_one(make):
    plain, gated = network(make, "none"), network(make)
    counts = [
        operators(export_program(PositionalSizer(model, ("rgb_mask",)).eval(), example()))
        for model in (plain, fold(gated), gated)
    ]
    assert counts[0] == counts[1]
    assert sum(counts[2].values()) > sum(counts[1].values())


def test_a_saved_program_computes_the_same(tmp_path):
    model, tensors, _ = exportable(SizingBundle(network(tiny_resnet), LogSize(), 64))
    path = save_program(export_program(model, tensors), tmp_path / "a.pt2")
    frames = example(count=3)
    with torch.no_grad():
        found = torch.export.load(path).module()(*frames)
        torch.testing.assert_close(found, model(*frames))


def test_a_network_in_training_is_refused(refused):
    model = PositionalSizer(network(tiny_resnet), ("rgb_mask",)).train()
    refused("evaluation mode", export_program, model, example())


class Fickle(nn.Module):
    """Adds the number of its calls, which a trace freezes."""

    calls = 0

    def forward(self, streams, geometry=None):
        self.calls += 1
        return streams["rgb_mask"].mean((1, 2, 3))[:, None] + self.calls


def test_a_wrong_program_is_not_written(refused):
    refused(
        "differs from PyTorch by",
        export_program,
        PositionalSizer(Fickle(), ("rgb_mask",)).eval(),
        example(),
    )


def test_a_missing_package_names_the_extra(absent, tmp_path, refused):
    absent("onnxscript")
    model = PositionalSizer(network(tiny_resnet), ("rgb_mask",)).eval()
    refused(
        r"export needs onnxscript: pip install 'gatesuite\[export",
        export_onnx,
        model,
        example(),
        tmp_path / "a.onnx",
        {},
        error=MissingExtraError,
    )
    assert not (tmp_path / "a.onnx").exists()
