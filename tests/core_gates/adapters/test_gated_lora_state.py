"""A ``GatedLoraLinear`` in checkpoints that write in place, and in exported graphs."""

import pytest
import torch
from torch import nn
from torch.distributed import checkpoint as dcp
from torch.export import Dim
from torch.testing import assert_close

from core_gates.adapters import GatedLoraLinear, LoraGate, LowRank
from tests.core_gates.drawn import filled

IN, OUT = 6, 8


def layer_of(*ranks, seed=0):
    torch.manual_seed(seed)
    adapters = [
        LowRank(torch.randn(r, IN), torch.randn(OUT, r), 0.5 + k) for k, r in enumerate(ranks)
    ]
    layer = GatedLoraLinear(nn.Linear(IN, OUT), adapters, gate=LoraGate(OUT))
    filled(layer.gate)
    return layer


def load_in_place(trained, layer, folder):
    dcp.save(trained.state_dict(), checkpoint_id=folder, no_dist=True)
    dcp.load(layer.state_dict(), checkpoint_id=folder, no_dist=True)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.fault("core F7")
def test_distributed_checkpoint_in_place(tmp_path):
    trained, layer, x = layer_of(1, 3), layer_of(2, 2, seed=1), torch.randn(5, IN)
    load_in_place(trained, layer, tmp_path)
    assert layer.ranks == [1, 3]
    assert_close(layer(x), trained(x), rtol=0, atol=0)
    assert_close(layer.gate_values(x), trained.gate_values(x), rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.fault("core F7")
def test_compiled_layers_notice_other_ranks(refuses, tmp_path):
    trained, layer, x = layer_of(1, 3), layer_of(2, 2, seed=1), torch.randn(5, IN)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    assert_close(compiled(x), layer(x))
    load_in_place(trained, layer, tmp_path)
    refuses(RuntimeError, ("the ranks of the adapters have changed", lambda: compiled(x)))
    assert layer.ranks == [1, 3]
    assert_close(compiled(x), trained(x))


@pytest.mark.slow
@pytest.mark.fault("core F6")
@pytest.mark.filterwarnings("ignore:.*treespec, LeafSpec:FutureWarning")  # by torch.onnx
def test_onnx():
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    layer = layer_of(2, 1, 3).eval()
    program = torch.onnx.export(
        layer,
        (torch.randn(4, IN),),
        dynamo=True,
        dynamic_shapes=({0: Dim("tokens", min=1)},),
        verbose=False,
    )
    session = onnxruntime.InferenceSession(program.model_proto.SerializeToString())
    for x in (torch.randn(9, IN), torch.randn(1, IN)):
        (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        assert_close(torch.from_numpy(found), layer(x).detach())
