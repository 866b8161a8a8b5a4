"""``gates diffusion merge --method baked`` with an embedded base of random weights."""

import json

import pytest
import torch
from safetensors import safe_open

from diffusion.fusion import GatedFusion
from diffusion.fusion.baking import MeanGates, bake
from diffusion.lora_file import Factors, LoraBundle, load_lora, save_lora
from diffusion.models.embedded_base import EmbeddedBase
from diffusion.models.text_encoders import text_encoder

PROMPTS = ("a red heart", "a house")


@pytest.fixture
def world(small_world):
    """A base, adapters ``a`` and ``b``, gates of them in a file, and the fusion."""
    base = EmbeddedBase.load("base")
    for name, own in (("a", "fox"), ("b", "night")):
        (small_world / f"loras/{own}.safetensors").rename(small_world / f"{name}.safetensors")
    adapters = {name: load_lora(f"{name}.safetensors") for name in "ab"}
    return base, adapters, GatedFusion(base.transformer, adapters, gates="gates.safetensors")


def test_the_mean_gates_of_the_prompts_are_baked(world, gates, tmp_path):
    printed = gates(
        "merge", "a.safetensors", "b.safetensors", "--output", "out.safetensors",
        "--method", "baked", "--base", "base", "--gates", "gates.safetensors", "--steps", 2,
        "--prompts", "; ".join(PROMPTS), "--weights", "a:0.5", "--seed", 3,
    )  # fmt: skip
    assert printed.splitlines()[-1] == "out.safetensors"
    with safe_open("out.safetensors", "pt") as file:
        record = json.loads(file.metadata()["gates.merge"])
    assert record | {"gates": record["gates"]["name"], "base": record["base"]["name"]} == {
        "method": "baked", "strengths": {"a": 0.5, "b": 1.0}, "gates": "gates.safetensors",
        "roles": {"a": "any", "b": "any"}, "base": "base", "prompts": list(PROMPTS), "steps": 2,
        "seed": 3,
    }  # fmt: skip
    assert len(record["base"]["sha256"]) == 64
    base, _, fusion = world
    fusion.set_strengths({"a": 0.5})
    encoder = text_encoder("ngrams")
    with fusion, MeanGates(fusion) as observed:
        for number, prompt in enumerate(PROMPTS):
            base.images(encoder.encode([prompt]), encoder.encode([""]), seeds=[3 + number], steps=2)
    expected = bake(fusion, observed.means)
    found = load_lora("out.safetensors")
    assert set(found.modules) == set(expected.modules)
    for name in found.modules:
        torch.testing.assert_close(
            found.delta_weight(name), expected.delta_weight(name), rtol=1e-4, atol=1e-6
        )


def test_baked_gates_follow_the_roles(world, gates):
    base, adapters, _ = world
    fusion = GatedFusion(base.transformer, adapters, factors=True)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in fusion.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    fusion.save_gates("told.safetensors")
    changes = {}
    for roles in ("a:subject,b:style", "b:subject,a:style"):
        gates(
            "merge", "a.safetensors", "b.safetensors", "--output", "out.safetensors", *BAKED,
            "--gates", "told.safetensors", "--steps", 1, "--roles", roles, "--overwrite_output",
        )  # fmt: skip
        fusion.describe(roles=dict(part.split(":") for part in roles.split(",")))
        with fusion, MeanGates(fusion) as observed:
            encoder = text_encoder("ngrams")
            base.images(encoder.encode(["a"]), encoder.encode([""]), seeds=[0], steps=1)
        found = load_lora("out.safetensors")
        name = next(iter(found.modules))
        changes[roles] = found.delta_weight(name)
        expected = bake(fusion, observed.means).delta_weight(name)
        torch.testing.assert_close(changes[roles], expected, rtol=1e-4, atol=1e-6)
    one, other = changes.values()
    assert float((one - other).norm() / one.norm()) > 0.05


def test_adapters_must_fit_the_embedded_base(world, gates, tmp_path):
    assert "left out" not in gates("inspect", "a.safetensors", "--base", "base")
    wide = {"transformer_blocks.0.attn.to_q": Factors(torch.ones(2, 16), torch.ones(16, 2))}
    save_lora(LoraBundle("flux", wide), tmp_path / "c.safetensors")
    assert "left out: transformer.transformer_blocks.0.attn.to_q" in gates(
        "inspect", "c.safetensors", "--base", "base"
    )


BAKED = ("--method", "baked", "--base", "base", "--gates", "gates.safetensors", "--prompts", "a")


def test_faulty_calls(world, faulty_inputs, tmp_path):
    def call(*words, without=()):
        pairs = [BAKED[i : i + 2] for i in range(0, len(BAKED), 2) if BAKED[i] not in without]
        given = [word for pair in pairs for word in pair]
        return (
            "diffusion", "merge", "a.safetensors", "b.safetensors", "--output", "o.safetensors",
            *given, *words,
        )  # fmt: skip

    other = call("--method", "sum")
    faulty_inputs(
        {
            "no base": (call(without=["--base"]), "needs a base that runs with the gates"),
            "a family as base": (call("--base", "flux"), "needs a base that runs with the gates"),
            "no gates": (call(without=["--gates"]), "needs a base that runs with the gates"),
            "no prompts": (call("--prompts", " ; "), "needs a base that runs with the gates"),
            "gates that are missing": (call("--gates", "x.safetensors"), "x.safetensors does not"),
            "gates that are an adapter": (call("--gates", "a.safetensors"), "gates of layers that"),
            "gates of a sum": (other, "--gates and --prompts have no meaning for sum"),
            "no steps": (call("--steps", "0"), "--steps is 0, expected at least one"),
            "a base that is damaged": (
                call("--base", "bad"),
                "bad.* is class|is of class None",
                {"bad/config.json": "{}"},
            ),
        },
        folder=tmp_path,
    )
