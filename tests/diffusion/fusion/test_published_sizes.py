"""The gates of FLUX.1-dev as published, without memory for any of them."""

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from diffusion.fusion import GatedFusion
from diffusion.lora_file import FluxShape

NAMES = [
    *(f"blocks.{k}.{name}" for k in range(19) for s in "ab" for name in (
        f"attn.{s}_to_qkv", f"attn.{s}_to_out", f"ff_{s}.0", f"ff_{s}.2", f"norm1_{s}.linear"
    )),
    *(f"single_blocks.{k}.{name}" for k in range(38)
      for name in ("to_qkv_mlp", "proj_out", "norm.linear")),
]  # fmt: skip
"""The fused layers of FLUX.1-dev as published."""


class FluxTransformer2DModel(nn.Module):
    """The linear layers of FLUX.1-dev at their places, without numbers."""

    def __init__(self):
        super().__init__()
        for name, (inputs, outputs) in FluxShape().modules().items():
            *parents, last = name.split(".")
            place = self
            for parent in parents:
                if parent not in dict(place.named_children()):
                    place.add_module(parent, nn.Module())
                place = place.get_submodule(parent)
            place.add_module(last, nn.Linear(inputs, outputs, device="meta"))


@pytest.mark.parametrize(("variant", "millions"), [("full", 27.316224), ("no_base", 24.281088)])
def test_published_sizes(variant, millions):
    fused = GatedFusion(FluxTransformer2DModel(), {}, everywhere=True, variant=variant)
    assert [name.replace("___", ".") for name in fused.gates] == NAMES
    assert len(NAMES) == 304
    assert all(parameter.is_meta for parameter in fused.parameters())
    assert sum(parameter.numel() for parameter in fused.parameters()) == millions * 1e6


def test_gates_load_strictly_onto_a_model_without_memory(tmp_path):
    model = FluxTransformer2DModel()
    empty = GatedFusion(model, {}, everywhere=True)
    for gate in empty.gates.values():
        gate.to_empty(device="cpu")
        nn.init.normal_(gate.weight_out)
        for name, parameter in gate.named_parameters():
            if name != "weight_out":
                nn.init.constant_(parameter, 0.5)
    path = empty.save_gates(tmp_path / "gates.safetensors")
    terms = ["weight_base", "weight_lora", "weight_cross", "weight_out", "bias"]
    terms += [f"norm_{of}.{part}" for of in ("base", "lora") for part in ("weight", "bias")]
    stored = {f"model_dict.{name.replace('.', '___')}.{term}" for name in NAMES for term in terms}
    assert load_file(path).keys() == stored
    loaded = GatedFusion(model, {}, everywhere=True, gates=path)
    assert not any(parameter.is_meta for parameter in loaded.parameters())
    for name, gate in empty.gates.items():
        assert torch.equal(loaded.gates[name].weight_out, gate.weight_out)
