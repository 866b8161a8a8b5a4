"""Layers exported for any number of tokens."""

import pytest
import torch
from torch import nn
from torch.export import Dim
from torch.testing import assert_close

from core_gates import (
    ExpertChoiceGate,
    GShardGate,
    MoELayer,
    ReMoEGate,
    StackedExperts,
    SwitchGate,
    TopKGate,
    TopPGate,
)
from tests.core_gates.drawn import filled

DIM, EXPERTS = 8, 4
GATES = {
    "switch": lambda: SwitchGate(DIM, EXPERTS, eval_capacity_factor=0.6),
    "switch per row": lambda: SwitchGate(DIM, EXPERTS, eval_capacity_factor=0.6, group_dim=-2),
    "gshard": lambda: GShardGate(DIM, EXPERTS, eval_capacity_factor=0.6, prioritized=True),
    "expert choice": lambda: ExpertChoiceGate(DIM, EXPERTS),
    "expert choice per row": lambda: ExpertChoiceGate(DIM, EXPERTS, group_dim=-2),
    "remoe": lambda: ReMoEGate(DIM, EXPERTS),
    "top-p": lambda: TopPGate(DIM, EXPERTS, p=0.6),
    "top-k": lambda: TopKGate(DIM, EXPERTS),
}


def layer_of(name):
    torch.manual_seed(0)
    return MoELayer(
        filled(GATES[name]()), StackedExperts(EXPERTS, DIM, 5), return_routing=False
    ).eval()


class Parallel(nn.Module):
    def __init__(self, *names):
        super().__init__()
        self.layers = nn.ModuleList(map(layer_of, names))

    def forward(self, x):
        return torch.stack([layer(x) for layer in self.layers])


def tokens(*shape):
    return torch.randn(*shape, DIM, generator=torch.Generator().manual_seed(1))


@pytest.mark.fault("core F6")
@pytest.mark.parametrize("name", GATES)
@pytest.mark.ends("an export a case")
def test_numbers_of_rows_and_tokens_may_be_dynamic(name):
    layer = layer_of(name)
    sizes = {0: Dim("rows", min=1), 1: Dim("length", min=1)}
    program = torch.export.export(layer, (tokens(2, 6),), dynamic_shapes=(sizes,)).module()
    for shape in ((2, 6), (1, 1), (3, 40), (7, 2)):
        x = tokens(*shape)
        assert_close(program(x), layer(x))
    if "switch" in name:  # the capacity followed the number of tokens
        _, routing = MoELayer(layer.gate, layer.experts)(x)
        assert torch.equal(program(x).any(-1), routing.kept.squeeze(-1))
        assert 0 < routing.kept.sum() < routing.kept.numel()


@pytest.mark.fault("core F6")
@pytest.mark.parametrize("name", ["gshard", "expert choice", "remoe"])
def test_padding_of_a_dynamic_number_of_tokens(name):
    layer, length = layer_of(name), Dim("length", min=1)
    mask = torch.tensor([False] * 5 + [True])
    program = torch.export.export(
        layer,
        (tokens(6),),
        {"padding_mask": mask},
        dynamic_shapes={"x": {0: length}, "padding_mask": {0: length}},
    ).module()
    for number in (1, 3, 30):
        x, mask = tokens(number), torch.arange(number) % 3 == 1
        assert_close(program(x, padding_mask=mask), layer(x, padding_mask=mask))


@pytest.mark.fault("core F6")
@pytest.mark.filterwarnings("ignore:.*treespec, LeafSpec:FutureWarning")  # by torch.onnx
@pytest.mark.slow
def test_onnx_of_sorting_gates():
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model = Parallel("switch", "top-p").eval()
    program = torch.onnx.export(
        model,
        (tokens(6),),
        dynamo=True,
        dynamic_shapes=({0: Dim("tokens", min=1)},),
        verbose=False,
    )
    session = onnxruntime.InferenceSession(program.model_proto.SerializeToString())
    for x in (tokens(9), tokens(1), torch.zeros(20, DIM)):  # ties go to the first
        (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        assert_close(torch.from_numpy(found), model(x).detach())
