"""Every packaged configuration is one of a verb, and runs a step."""

import inspect
import json
from pathlib import Path

import pytest
import torch
import yaml

import apps.diffusion
import diffusion
import diffusion.experiments.trained_gates as trained_gates
from apps.diffusion.commands import FUNCTIONS
from apps.diffusion.embedded_world import World
from apps.diffusion.studies.base_study import ENCODER, UNSEEN
from apps.diffusion.studies.fusion_study import GATES, VARIANTS
from apps.diffusion.studio import USED
from apps.diffusion.training.train_on_adapters import Gates, GatesTraining
from apps.main import main
from diffusion.data.concepts import concepts
from diffusion.lora_file import Factors, LoraBundle, save_lora
from diffusion.lora_file.recognition import shape_in
from diffusion.models.embedded_base import EmbeddedBase

CONFIGS = sorted((Path(apps.diffusion.__file__).parent / "configs").glob("*.yaml"))
SHIPPED_GATES = Path(diffusion.__file__).parent / "weights/embedded/gates/gates-s0/record.json"
SMALL = ("--base", "base", "--devices", "1", "--steps", "1")
RUNS = {
    "flux_gates": ("train-gates", "--csv", "table.csv", *SMALL),
    "flux_retriever": ("train-retriever", "--csv", "table.csv", *SMALL),
    "flux_lora": ("train-lora", "images", "--base", "base", "--size", "32", "--steps", "1"),
}
UNIT = {"shape": "unit", "steps": 1, "batch_size": 4, "learning_rate": 1e-3,
        "text_encoder": "ngrams"}  # fmt: skip


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_sections_are_of_verbs_and_name_their_options(path):
    content = yaml.safe_load(path.read_text())
    assert content
    for verb, section in content.items():
        function = FUNCTIONS[verb].load()
        known = set(inspect.signature(function).parameters)
        for name in FUNCTIONS[verb].flat:
            known |= set(inspect.get_annotations(inspect.signature(
                function, eval_str=True).parameters[name].annotation))  # fmt: skip
        assert set(section) <= known


def test_what_ships_is_trained_by_default_and_by_its_configuration():
    section = yaml.safe_load(next(p for p in CONFIGS if p.stem == "embedded").read_text())
    rates = {"learning_rate": json.loads(SHIPPED_GATES.read_text())["settings"]["learning_rate"]}
    assert section["train-gates"] == GATES | rates
    assert {**Gates().settings(), **GatesTraining().settings()} == {
        **dict.fromkeys({**Gates().settings(), **GatesTraining().settings()}),
        **GATES,
        **rates,
    }
    assert section["train-retriever"]["steps"] == ENCODER["steps"]


@pytest.mark.parametrize("name", RUNS)
def test_published_recipes_run_a_step(name, place, capsys):
    if name == "flux_retriever":
        draw = torch.Generator().manual_seed(0)
        for number in range(4):  # of all layers, which the published encoder asks for
            modules = {
                layer: Factors(torch.randn(1, i, generator=draw), torch.randn(o, 1, generator=draw))
                for layer, (i, o) in shape_in(place / "base").modules().items()
            }
            save_lora(LoraBundle("flux", modules), place / f"a{number}.safetensors")
    verb, *words = RUNS[name]
    assert main(["diffusion", verb, "--config", name, *words]) == 0, capsys.readouterr().err
    made = Path(capsys.readouterr().out.strip().splitlines()[-1])
    assert made.exists()
    assert made.parts[2] == name


@pytest.fixture
def zoo(place, monkeypatch):
    """A world whose base and adapters are as good as trained."""
    monkeypatch.setattr("apps.diffusion.embedded_world.BASE", UNIT)
    world = World("runs")
    world.bases.keep(world.base_piece, EmbeddedBase.load("base"))
    for number, concept in enumerate(concepts()):
        draw = torch.Generator().manual_seed(number)
        layer = "transformer_blocks.0.attn.to_q"
        factors = Factors(*(torch.randn(*size, generator=draw) for size in ((2, 32), (32, 2))))
        bundle = LoraBundle("flux", {layer: factors}, metadata={"modelspec.title": concept.name})
        world.adapters.keep(world.adapter_piece(concept, 0), bundle)
    return world


def test_the_zoo_is_trained_on_as_the_studies_do(zoo, capsys):
    settings = {}
    for verb in ("train-retriever", "train-gates"):
        words = ["--config", "embedded", "--steps", "2"]
        assert main(["diffusion", verb, *words]) == 0, capsys.readouterr().err
        made = Path(capsys.readouterr().out.strip().splitlines()[-1])
        settings[verb] = json.loads((made.parent / "record.json").read_text())["settings"]
    trained = [one.name for one in concepts() if one.name not in UNSEEN]
    own = {"start": zoo.zoo_digest, "concepts": trained, "steps": 2}
    assert settings["train-retriever"] == ENCODER | own
    shipped = json.loads(SHIPPED_GATES.read_text())["settings"]
    rates = {"learning_rate": shipped["learning_rate"]}
    assert settings["train-gates"] == GATES | rates | {"start": zoo.zoo_digest, "steps": 2}
    assert shipped == settings["train-gates"] | {"start": shipped["start"], "steps": 400}


def test_several_processes_want_a_whole_zoo(zoo, capsys):
    assert main(["diffusion", "train-gates", "--devices", "2"]) == 2
    assert "adapters of the zoo are missing: train them first" in capsys.readouterr().err


def test_strengths_of_the_zoo_are_those_of_the_studies(zoo, capsys, monkeypatch):
    every = trained_gates.combinations
    monkeypatch.setattr(trained_gates, "combinations", lambda group: every(group)[:4])
    words = ["--what", "strengths", "--role_fraction", "1", "--steps", "2"]
    assert main(["diffusion", "train-gates", *words]) == 0, capsys.readouterr().err
    made = Path(capsys.readouterr().out.strip().splitlines()[-1])
    assert made.parent.name == USED["strengths"][1]
    found = json.loads((made.parent / "record.json").read_text())
    assert found["identity"]["method"] == "layer_strengths + role"
    own = {"steps": 2, "start": zoo.zoo_digest}
    assert found["settings"] == VARIANTS["layer_strengths + role"] | own
