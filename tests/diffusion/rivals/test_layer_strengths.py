"""Learned strengths: whom they weigh, one static adapter that does the same, and training."""

from functools import partial

import pytest
import torch
from torch import nn
from torch.testing import assert_close as close

from core_gates.errors import GatesError
from diffusion.fusion import GatedFusion
from diffusion.fusion.baking import bake, strengthened
from diffusion.lora_file import LoraBundle

strengths = partial(GatedFusion, mode="strengths")
# the RMS norms of the transformer round to float32, so routes that differ by 1e-16 may differ there
assert_close = partial(close, atol=2e-6, rtol=2e-6)


class Dense(LoraBundle):
    """An adapter whose layers are multiplied."""

    def delta_weight(self, module, weight=None):
        return super().delta_weight(module, weight) * self.metadata["factor"](module)


def draw(rival):
    """Factors that differ by layer, number and role, in layers of a width each."""
    torch.manual_seed(0)
    for parameter in rival.parameters():
        nn.init.normal_(parameter)
    return {
        part: gate.factors.detach()
        for site in rival.sites
        for part, gate in [(part, rival.gate(site.name)) for part in site.parts]
    }


@pytest.mark.parametrize("swapped", [False, True])
@pytest.mark.parametrize("many", [False, True])  # b and c lack layers, b has another rank
def test_roles_and_numbers_weigh_layer_by_layer(flux, inputs, adapters, dense, many, swapped):
    names = "abc" if many else "ab"
    given = {name: adapters[name] for name in (reversed(names) if swapped else names)}
    rival = strengths(flux, given).double()
    with rival:
        assert_close(flux(**inputs)[0], dense(given))  # ones at the start
    factors = draw(rival)
    kinds = {"a": 1, "b": 2, "c": 0}
    rival.describe(roles={"a": "subject", "b": "style"})

    def factor(kind):
        def of(module):
            own = factors[module][int(many)]
            return own[0] + (own[kind] if kind else 0)

        return {"factor": of}

    expected = {
        name: Dense(b.family, b.modules, metadata=factor(kinds[name])) for name, b in given.items()
    }
    with torch.no_grad():
        truth = dense(expected, {"a": 0.6, "b": 1.0, "c": -0.3})
    with rival:
        rival.set_strengths({"a": 0.6} | ({"c": -0.3} if many else {}))
        assert_close(flux(**inputs)[0].detach(), truth)
    assert_close(dense({"one": bake(rival)}), truth)


def test_what_was_learned_serves_other_adapters_once_they_are_told(flux, inputs, adapters, bundle,
                                                                    dense):  # fmt: skip
    rival = strengths(flux, adapters).double()
    with torch.no_grad():
        for parameter in rival.parameters():
            parameter.copy_(torch.tensor([[0.5, 0.2, 2.0], [3.0, 4.0, 5.0]]))
    rival.describe(roles={"a": "subject"})
    pair = {"x": bundle(7), "y": bundle(8)}
    rival.set_adapters(pair)  # two: the first row; what was told of others is forgotten
    assert_close(dense({"one": bake(rival)}), dense(pair, {"x": 0.5, "y": 0.5}))
    rival.describe(roles={"x": "subject", "y": "style"})
    truth = dense(pair, {"x": 0.7, "y": 2.5})
    assert_close(dense({"one": bake(rival)}), truth)
    with rival:
        assert_close(flux(**inputs)[0].detach(), truth)
        rival.describe(roles={"x": "style", "y": "subject"})
        assert_close(flux(**inputs)[0].detach(), dense(pair, {"x": 2.5, "y": 0.7}))


def test_refusals(flux, bundle, refuses):
    rival = strengths(flux, {"a": bundle(1, where="attn")})
    with pytest.raises(GatesError, match=r"which had none when this was made: make it with"):
        rival.set_adapters({"a": bundle(1)})
    assert list(rival.adapters["a"].modules) == list(bundle(1, where="attn").modules)
    refuses(
        GatesError,
        (
            "the role of a is 'shape'; choose one of any, subject",
            lambda: rival.describe(roles={"a": "shape"}),
        ),
        ("no adapter is named 'z'; there are a", lambda: rival.describe(roles={"z": "style"})),
        ("must be finite", lambda: rival.describe(scores={"a": float("nan")})),
    )


ROLES = {"a": "subject", "b": "style", "c": "any"}
WEIGHTS = {"a": 0.6, "b": 1.0, "c": -0.3}


@pytest.mark.parametrize("names", ["ab", "cba"])
def test_a_file_folds_into_the_same_adapter_without_the_model(flux, adapters, tmp_path, names):
    given = {name: adapters[name] for name in names}
    roles, weights = ({n: own[n] for n in names} for own in (ROLES, WEIGHTS))
    rival = strengths(flux, given, everywhere=True)
    draw(rival)
    path = rival.save_gates(tmp_path / "strengths.safetensors")
    rival.set_strengths(weights)
    rival.describe(roles=roles)
    found = strengthened(given, path, strengths=weights, roles=roles)
    assert (found.family, set(found.modules)) == ("flux", set(bake(rival).modules))
    for name in found.modules:
        assert_close(found.delta_weight(name), bake(rival).delta_weight(name))
    swapped = strengthened(given, path, strengths=weights, roles=roles | {"a": "style"})
    name = "transformer_blocks.0.attn.to_q"
    assert not torch.allclose(swapped.delta_weight(name), found.delta_weight(name))


def test_a_file_of_anything_else_is_refused(flux, adapters, bundle, tmp_path):
    given = {"a": adapters["a"], "x": bundle(5, where="attn")}
    wanted = {"strengths": dict.fromkeys(given, 1.0), "roles": dict.fromkeys(given, "any")}
    made = GatedFusion(flux, given, everywhere=True, factors=True)
    gates = made.save_gates(tmp_path / "gates.safetensors")
    few = strengths(flux, {"x": given["x"]}).save_gates(tmp_path / "few.safetensors")
    (tmp_path / "damaged.safetensors").write_text("no")
    for path, message in (
        (gates, "holds no strengths of .* alone"),
        (few, "holds no strengths of .* alone"),
        (tmp_path / "damaged.safetensors", "is missing or damaged"),
    ):
        with pytest.raises(GatesError, match=message):
            strengthened(given, path, **wanted)
