"""Strengths by layer of a file, in images and in one adapter; roles that are told or tagged."""

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from apps.diffusion.adapter_files import roles_of
from apps.diffusion.studio import USED, shipped
from core_gates.errors import GatesError
from diffusion.experiments.trained_gates import GatesForm
from diffusion.fusion import GatedFusion
from diffusion.fusion.baking import bake
from diffusion.fusion.gates_file import gate_tensors
from diffusion.lora_file import Factors, LoraBundle, load_lora
from diffusion.models.embedded_base import EmbeddedBase

HERE = ("--base", "base", "--library", "loras", "--steps", "2", "--adapters", "fox,snow")
MODE = ("--mode", "strengths", "--gates", "strengths.safetensors")
MERGED = ("merge", "loras/fox.safetensors", "loras/snow.safetensors", "--method", "strengths")
ROLES = ("--roles", "fox:subject,snow:style")
SWAPPED = ("--roles", "snow:subject, fox:style")


def drawn(model, adapters):
    """Strengths that differ from 1 in every layer."""
    made = GatedFusion(model, adapters, mode="strengths", everywhere=True)
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(torch.randn_like(parameter))
    return made


@pytest.fixture
def strengths(small_world):
    """The adapters ``fox`` and ``snow`` with strengths, which are in a file."""
    base = EmbeddedBase.load("base")
    adapters = {name: load_lora(f"loras/{name}.safetensors") for name in ("fox", "snow")}
    made = drawn(base.transformer, adapters)
    made.save_gates("strengths.safetensors")
    return made


@pytest.fixture
def image(gates, small_world):
    """Make an image, and return its pixels and its record."""

    def call(output, *words):
        gates("generate", "snow", *words, "--output", output)
        (path,) = (small_world / output).glob("*.json")
        with Image.open(path.with_suffix(".png")) as found:
            return np.asarray(found).astype(int), json.loads(path.read_text())

    return call


def test_images_and_the_merged_adapter_follow_the_roles(strengths, image, gates, small_world):
    told, record = image("told", *HERE, *MODE, *ROLES)
    assert {one["name"]: one["role"] for one in record["adapters"]} == {
        "fox": "subject", "snow": "style"
    }  # fmt: skip
    assert (record["mode"], len(record["hashes"]["gates"])) == ("strengths", 16)
    swapped, other = image("swapped", *HERE, *MODE, *SWAPPED)
    plain, _ = image("plain", *HERE, "--mode", "sum")
    assert record["adapters"] != other["adapters"]
    assert all(np.abs(a - b).max() > 8 for a, b in ((told, swapped), (told, plain)))
    for words, expected in ((ROLES, told), (SWAPPED, swapped)):
        folder = small_world / words[1][:4].strip()
        folder.mkdir()
        gates(*MERGED, *MODE[2:], *words, "--output", folder / "one.safetensors")
        alone = ("--base", "base", "--library", folder, "--steps", "2", "--adapters", "one")
        found, _ = image(f"{folder.name}-alone", *alone, "--mode", "sum")
        assert np.abs(found - expected).max() <= 1


def test_what_is_merged_is_the_bundle_of_the_strengths(strengths, gates):
    printed = gates(*MERGED, *MODE[2:], *ROLES, "--weights", "fox:0.5", "--output", "o.safetensors")
    assert "fox × 0.5" in printed
    with safe_open("o.safetensors", "pt") as file:
        record = json.loads(file.metadata()["gates.merge"])
    digest = hashlib.sha256(Path("strengths.safetensors").read_bytes()).hexdigest()
    assert (record["gates"]["name"], record["gates"]["sha256"]) == (MODE[-1], digest)
    assert record["roles"] == {"fox": "subject", "snow": "style"}
    assert record["strengths"] == {"fox": 0.5, "snow": 1.0}
    assert record.keys() == {"method", "gates", "roles", "strengths"}
    assert "left out" not in printed
    tensors = load_file(MODE[-1]) | {"model_dict.adapter_switch.switch": torch.zeros(3)}
    save_file(tensors, "switched.safetensors")
    words = ("--gates", "switched.safetensors", *ROLES, "--output", "p.safetensors")
    assert "left out: the switch of switched.safetensors: a file" in gates(*MERGED, *words)
    strengths.set_strengths({"fox": 0.5})
    strengths.describe(roles={"fox": "subject", "snow": "style"})
    found, expected = load_lora("o.safetensors"), bake(strengths)
    assert set(found.modules) == set(expected.modules)
    for name in found.modules:
        torch.testing.assert_close(
            found.delta_weight(name), expected.delta_weight(name), rtol=1e-4, atol=1e-5
        )


ASKED = "which of fox, snow is the subject: give --roles, such as fox:subject,snow:style"


def test_faulty_images(strengths, faulty_inputs, gates, small_world):
    def call(*words):
        return ("diffusion", "generate", "snow", *HERE, *words)

    gates("index", "loras")
    other = (*MODE[:2], "--gates", "gates.safetensors", *ROLES)
    faulty_inputs(
        {
            "no roles": (call(*MODE), ASKED),
            "no strengths": (
                call(*MODE[:2], *ROLES),
                "--mode strengths needs what is trained for it",
            ),
            "gates": (call(*other), "gates.safetensors is for --mode gated, not strengths: leave"),
            "an unknown adapter": (call(*MODE, "--roles", "fxo:style"), "is named 'fxo'"),
            "roles of a sum": (
                call("--mode", "sum", *ROLES),
                "--roles has no meaning for --mode sum: leave it out",
            ),
            "an unknown role": (
                call(*MODE, "--roles", "fox:hero"),
                "--roles is 'fox:hero', expected",
            ),
            "two roles": (
                call(*MODE, "--roles", "fox:style,fox:subject"),
                "--roles names 'fox' twice: give each adapter one role",
            ),
            "parts of no file": (
                call(*MODE, *ROLES, "--components", "loras"),
                "--components is for a GGUF file: leave it out",
            ),
        },
        folder=small_world,
    )


def test_faulty_merges(strengths, faulty_inputs, small_world):
    def call(*words, gates="strengths.safetensors"):
        return ("diffusion", *MERGED, "--gates", gates, "--output", "o.safetensors", *words)

    none = "holds no strengths of"
    faulty_inputs(
        {
            "no roles": (call(), ASKED),
            "no file": (("diffusion", *MERGED, "--output", "o.safetensors"), "needs --gates FILE"),
            "gates": (call(*ROLES, gates="gates.safetensors"), none),
            "an adapter as strengths": (call(*ROLES, gates="loras/fox.safetensors"), none),
            "a missing file": (call(*ROLES, gates="none.safetensors"), "does not exist"),
            "no role": (call("--roles", "fox"), "--roles is 'fox', expected adapters with"),
            "prompts": (call("--prompts", "a"), "have no meaning for strengths"),
            "density": (call("--density", "0.5"), "no meaning for strengths"),
            "roles of a sum": (
                ("diffusion", *MERGED[:3], "--output", "o.safetensors", *ROLES),
                "--roles has no meaning for sum",
            ),
        },
        folder=small_world,
    )


def bundle(tags=""):
    modules = {"x": Factors(torch.ones(1, 2), torch.ones(2, 1))}
    return LoraBundle("flux", modules, metadata={"modelspec.tags": tags})


@pytest.mark.parametrize(
    ("tags", "given", "expected"),
    [
        ({"a": "", "b": ""}, {"b": "subject"}, {"a": "any", "b": "subject"}),
        ({"a": "style", "b": ""}, {"b": "subject"}, {"a": "style", "b": "subject"}),
        ({"a": "style", "b": "subject, b"}, {}, {"a": "style", "b": "subject"}),
        ({"a": ""}, {}, {"a": "any"}),  # nothing to tell it from
        ({}, {}, {}),
    ],
)
def test_roles_are_given_or_tagged(tags, given, expected):
    assert roles_of({name: bundle(own) for name, own in tags.items()}, given) == expected


def test_roles_that_nothing_tells_are_asked_for():
    adapters = {"a": bundle(), "b": bundle("style"), "c": bundle()}
    with pytest.raises(GatesError, match="such as a:subject,b:style"):
        roles_of(adapters, {})
    assert roles_of(adapters, {}, ask=False) == {"a": "any", "b": "style", "c": "any"}


def test_strengths_that_were_trained_here_are_used(zoo_root, write, gates, monkeypatch, tmp_path):
    shutil.copytree(zoo_root, tmp_path / "runs")
    world = write.world_of(tmp_path / "runs")
    monkeypatch.setattr("apps.diffusion.embedded_world.World", write.world_of)
    files = world.zoo_files(0)
    made = drawn(world.base.transformer, {name: load_lora(files[name]) for name in list(files)[:2]})
    piece = world.run.piece("layer_strengths + role", 0, start=world.zoo_digest)
    world.run.store("gates", GatesForm()).keep(piece, gate_tensors(made.gate_states()))
    assert shipped(world).gates["strengths"].parent.name == USED["strengths"][1] == piece.name
    first, second = list(files)[::39]
    gates("generate", "a house", "--root", world.run.folder.parents[1], "--steps", "1",
          "--adapters", f"{first},{second}", "--mode", "strengths", "--output", tmp_path / "out",
          "--roles", f"{first}:subject,{second}:style")  # fmt: skip
    (path,) = (tmp_path / "out").glob("*.json")
    record = json.loads(path.read_text())
    roles = {one["name"]: one["role"] for one in record["adapters"]}
    assert roles == {first: "subject", second: "style"}
