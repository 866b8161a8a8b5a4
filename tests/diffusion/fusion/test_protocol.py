"""One adapter for several: the exact sum, and what they have in common."""

import pytest
import torch
from torch.testing import assert_close

from core_gates.errors import GatesError
from diffusion.fusion.gated_fusion import global_lora
from diffusion.fusion.protocol import modules_of, plain_factors, weighted_sum
from diffusion.lora_file import Factors, LoraBundle


@pytest.fixture
def adapters(bundle):
    return {"a": bundle(1), "b": bundle(2, rank=3, where="attn"), "c": bundle(3, where="ff")}


def total(adapters, module, weights):
    found = [w * b.delta_weight(module) for b, w in zip(adapters.values(), weights, strict=True)
             if module in b.modules]  # fmt: skip
    return sum(found)


def test_the_weighted_sum_is_exact(adapters):
    weights = (0.5, -1.25, 2.0)
    made = weighted_sum(adapters, dict(zip(adapters, weights, strict=True)))
    assert list(made.modules) == modules_of(adapters)
    for module in made.modules:
        assert_close(made.delta_weight(module), total(adapters, module, weights))
    assert made.ranks()["transformer_blocks.0.attn.to_q"] == 5
    assert_close(
        weighted_sum(adapters).delta_weight("proj_out"), total(adapters, "proj_out", (1,) * 3)
    )


def test_half_precision_is_added_in_float32():
    half = Factors(torch.full((1, 2), 0.1).half(), torch.ones(2, 1).bfloat16(), 3.0)
    made = weighted_sum({"a": LoraBundle("flux", {"x": half})}, {"a": 1 / 3}).modules["x"]
    assert made.up.dtype == made.down.dtype == torch.float32
    assert_close(made.delta_weight(), half.down.float().expand(2, 2), rtol=1e-6, atol=0)


@pytest.mark.parametrize("rank", [1, 2, 4, 99])
def test_global_lora_is_the_best_approximation_of_the_mean(adapters, rank):
    made = global_lora(adapters, rank)
    for module in modules_of(adapters):
        mean = total(adapters, module, (1 / 3,) * 3)
        left, sizes, right = torch.linalg.svd(mean, full_matrices=False)
        best = left[:, :rank] * sizes[:rank] @ right[:rank]
        assert_close(made.delta_weight(module), best)
        assert made.ranks()[module] <= rank


def test_global_lora_never_forms_a_change():
    n, generator = 60_000, torch.Generator().manual_seed(0)  # ΔW would take 14 GB

    def one():
        shapes = (2, n), (n, 2)
        return LoraBundle(
            "flux", {"x": Factors(*(torch.randn(*s, generator=generator) for s in shapes))}
        )

    assert global_lora({"a": one(), "b": one()}, 2).ranks() == {"x": 2}


@pytest.mark.fault("diffusion D9")
def test_refusals(adapters, bundle, refuses):
    refuses(
        GatesError,
        ("there are no adapters to approximate", lambda: global_lora({}, 2)),
        ("rank is 0", lambda: global_lora(adapters, 0)),
        (
            "found 'a' for flux, 'z' for sd3",
            lambda: weighted_sum({"a": bundle(1), "z": bundle(1, family="sd3")}),
        ),
    )
    dora = bundle(1)
    dora.modules["proj_out"] = dora.modules["proj_out"]._replace(magnitude=torch.ones(4, 1))
    with pytest.raises(GatesError, match=r"adapter 'd' is a DoRA at proj_out.*: leave it out$"):
        global_lora({"d": dora}, 1)
    assert plain_factors({"d": dora}, "x_embedder")
