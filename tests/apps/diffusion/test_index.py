"""Folders that are indexed, and what searches of them print."""

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import apps.diffusion.search
from core_gates.errors import GatesError
from diffusion.library import LoraLibrary
from diffusion.lora_file import FluxShape
from diffusion.models.text_encoders import text_encoder
from diffusion.retrieval.encoder import LoraWeightEncoder
from diffusion.retrieval.encoder_config import EncoderConfig
from harness.command.verbs import FunctionVerb, run_verb

VERBS = {
    "index": FunctionVerb("apps.diffusion.search:index", ("folder",)),
    "search": FunctionVerb("apps.diffusion.search:search", "prompt"),
}


class Encoder:
    """Points where the title of an adapter does."""

    family, fingerprint, dim = "flux", "titles", 384

    def refusal(self, bundle):
        return None

    def encode(self, bundle):
        return text_encoder("ngrams").embed([bundle.metadata["modelspec.title"]])[0]


@pytest.fixture
def call(samples, capsys):
    """Run a verb and return what it prints."""

    def run(*words):
        capsys.readouterr()
        run_verb("diffusion", VERBS, list(map(str, words)), config="tiny")
        return capsys.readouterr().out

    return run


@pytest.fixture
def refusal(call):
    """Run a verb that is refused, and return why, in one line."""

    def run(*words):
        with pytest.raises(GatesError) as caught:
            call(*words)
        assert str(caught.value).isprintable()
        return str(caught.value)

    return run


@pytest.fixture
def titled(samples, monkeypatch):
    """Files with titles, and a folder of an encoder."""
    for name, title in (("bfl_plain", "red fox"), ("xlabs", "night [bold]sky")):
        path = samples / f"{name}.safetensors"
        metadata = {"modelspec.title": title, "modelspec.license": "CC0-1.0"}
        save_file(load_file(path), path, metadata)
    for path in samples.glob("*.safetensors"):
        if path.stem not in ("bfl_plain", "xlabs", "kohya_sd3"):
            path.unlink()
    asked = []

    def read(folder, text_fingerprint=None):
        asked.append((folder, text_fingerprint))
        return Encoder()

    monkeypatch.setattr(apps.diffusion.search, "read_encoder", read)
    return asked


def row(text, name):
    """The cells of the row of an adapter or figure."""
    (line,) = [line for line in text.splitlines() if name in line and line.startswith("│")]
    return [cell.strip() for cell in line.strip("│┃ ").split("│")]


def test_a_folder_is_indexed_and_searched(call, samples, titled):
    told = call("index", "samples", "--encoder", "some/folder")
    assert row(told, "adapters") == ["adapters", "3"]
    assert row(told, "encoded now") == ["encoded now", "2"]
    assert row(told, "kohya_sd3") == [
        "kohya_sd3.safetensors",
        "it is for sd3, the encoder serves flux",
    ]
    assert told.splitlines()[-1] == "samples/.gates-index"
    again = call("index", "samples", "--encoder", "some/folder")
    assert row(again, "unchanged") == ["unchanged", "3"]
    assert row(again, "encoded now") == ["encoded now", "0"]

    options = ("--folder", "samples", "--text_encoder", "ngrams")
    told = call("search", "red", "foxes", *options, "--encoder", "e", "--k", "1")
    assert titled[-1] == ("e", text_encoder("ngrams").fingerprint)
    assert "by names, then weights" in told
    assert row(told, "bfl_plain")[:2] == ["1", "bfl_plain"]
    assert float(row(told, "bfl_plain")[2]) > 0.5
    assert "red fox" in told
    assert "CC0-1.0" in told
    assert "xlabs" not in told
    assert "1 of 3 adapters have no embedding of this encoder" in told

    told = call("search", "sky", *options, "--encoder", "e", "--mode", "hybrid", "--metadata", "1")
    rank, name, score, weights, metadata, title, *_ = row(told, "xlabs")
    assert (rank, name, metadata, title) == ("1", "xlabs", "1.000", "night [bold]sky")
    assert float(score) == pytest.approx(float(weights) + 1, abs=2e-3)

    told = call("search", "fox", *options)
    assert "by metadata" in told
    assert "no encoder is given: only metadata is searched" in told
    assert "no adapter is found" in call("search", "fox", *options, "--license", "MIT")


@pytest.mark.fault("diffusion D3")
def test_what_scores_below_the_least_is_printed_as_left_out(call, samples, titled, refusal):
    call("index", "samples", "--encoder", "e")
    options = ("--folder", "samples", "--text_encoder", "ngrams", "--encoder", "e")
    told = call("search", "a red fox", *options)
    assert row(told, "bfl_plain")[:2] == ["1", "bfl_plain"]
    assert "left out: xlabs " in told
    assert not [line for line in told.splitlines() if "│" in line and "xlabs" in line]
    assert "named: red fox" in call("search", "a red fox", *options, "--least", "0.99")
    told = call("search", "a red fox", *options, "--least", "0.99", "--mode", "weights")
    assert re.search(r"^left out: bfl_plain \.\d{3}, below \.990$", told, re.MULTILINE)
    assert "no adapter is found" in call("search", "red submarine", *options, "--least", "0.9")
    assert row(call("search", "red fox", *options, "--least=-1"), "xlabs")[0] == "2"
    assert "--least is 2.0, expected a cosine" in refusal("search", "fox", *options, "--least", "2")
    without = ("--folder", "samples", "--least", "0.1")
    assert "where an encoder is given" in refusal("search", "fox", *without)


@pytest.mark.fault("46 D1")
def test_what_generate_would_not_take_is_marked(call, samples, titled, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    call("index", "samples", "--encoder", "e")
    options = ("--folder", "samples", "--text_encoder", "ngrams", "--encoder", "e", "--least=-1")
    lines = call("search", "red fox", *options).splitlines()
    (named,) = [line for line in lines if "│ bfl_plain" in line]
    (unnamed,) = [line for line in lines if "│ xlabs" in line]
    assert "named: red fox" in named
    assert "--fill" not in named
    assert "not in the prompt: `generate` needs --fill to take it" in unnamed
    assert "--fill" not in call("search", "animal", *options)  # nothing is named: all are taken


@pytest.mark.fault("46 D2")
def test_paths_are_printed_and_all_that_is_known_is_written(call, samples, titled, refusal):
    call("index", "samples", "--no_encode")
    told = call("search", "fox", "--folder", "samples", "--json", "found.json")
    assert told.splitlines()[-1] == "1 samples/bfl_plain.safetensors"
    content = json.loads(Path("found.json").read_text())
    (found,) = content["adapters"]
    assert found["path"] == "samples/bfl_plain.safetensors"
    assert (found["name"], found["title"], found["metadata"]) == ("bfl_plain", "red fox", 1.0)
    assert (content["mode"], content["left_out"]) == ("metadata", {})
    again = ("search", "--like", "bfl_plain", "--folder", "samples", "--json", "found.json")
    assert "--overwrite_output" in refusal(*again)
    told = call(*again, "--overwrite_output")
    near = json.loads(Path("found.json").read_text())["adapters"]
    assert [f"{n} {one['path']}" for n, one in enumerate(near, 1)] == told.splitlines()[
        -len(near) :
    ]
    assert all(-1 <= one["cosine"] <= 1 for one in near)


@pytest.mark.fault("diffusion D4")
def test_common_words_and_unknown_ones_find_nothing(call, samples, write):
    for seed, name in enumerate(("grey", "shadowed")):
        told = {"modelspec.tags": f"style, {name}", "modelspec.description": "a style for the base"}
        write.adapter(samples / "zoo" / f"{name}.safetensors", name, seed, **told)
    call("index", "samples/zoo")
    for prompt in ("the", "a fox in demo style", "the style of an image"):
        assert "no adapter is found" in call("search", prompt, "--folder", "samples/zoo")
    told = call("search", "a fox in grey", "--folder", "samples/zoo")
    assert row(told, "grey")[:3] == ["1", "grey", "0.500"]
    assert "shadowed" not in told


def test_a_published_encoder_is_read_from_its_file(tmp_path):
    shape = FluxShape(1, 1, num_heads=1, head_dim=16)
    sizes = {"dim": 16, "heads": 1, "hidden_dim": 32, "probes": 3}
    torch.manual_seed(0)
    made = LoraWeightEncoder(EncoderConfig.prompt_token(shape, text_dim=16, **sizes))
    save_file(made.state_dict(), tmp_path / "published.safetensors")
    found = apps.diffusion.search.read_encoder(str(tmp_path / "published.safetensors"), "any")
    for name, tensor in made.state_dict().items():
        assert torch.equal(found.encoder.state_dict()[name], tensor)


def test_likeness(call, samples):
    told = call("index", "samples", "--no_encode")
    assert row(told, "encoded now") == ["encoded now", "0"]
    with LoraLibrary("samples") as library:
        assert len(library.adapters()) == 8
    assert "--encoder" not in told
    told = call("search", "--folder", "samples", "--like", "samples/bfl_plain.safetensors")
    assert row(told, "bfl_plain")[2] == "1.000"
    assert "near-duplicate" in row(told, "bfl_plain")[-1]
    told = call("search", "--folder", "samples", "--like", "bfl_plain", "-k", "2")
    assert "bfl_plain" not in told
    assert "near-duplicate" not in told


def test_likeness_of_those_that_pass_filters(call, samples, titled):
    call("index", "samples", "--no_encode")
    words = ("search", "--folder", "samples", "--like", "bfl_plain")
    assert row(call(*words, "--license", "cc0-1.0"), "xlabs")[1] == "xlabs"
    for option in (("--license", "MIT"), ("--tag", "none"), ("--family", "sd3")):
        told = call(*words, *option)
        assert "no adapter is found" in told
        assert f"no other adapter is for flux, {option[0][2:]} '{option[1]}'" in told


def test_an_empty_folder_is_named(call, samples):
    (samples / "empty").mkdir()
    assert "no adapter is found in samples/empty" in call("index", "samples/empty")
    assert "no adapter is found" not in call("index", "samples")


def test_refused_files_are_listed(call, samples):
    for number in range(25):
        (samples / f"broken {number:02}.safetensors").write_bytes(b"[red]no")
    told = call("index", "samples")
    assert row(told, "refused   ")[1] == "25"
    assert row(told, "broken 19")[0] == "broken 19.safetensors"
    assert "too few for a" in told
    assert "broken 20" not in told
    assert "and 5 more: --every_file lists them" in told
    assert "no --encoder is given" in told
    assert row(told, "found by metadata")[1] == row(told, "adapters ")[1]
    assert "broken 24" in call("index", "samples", "--every_file")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("index", "none"), "missing"),
        (("index", "samples/bfl_plain.safetensors"), "a file"),
        (("index", "samples", "--no_encode", "--encoder", "e"), "exclude each other"),
        (("index", "samples", "--encoder", "none"), "none"),
        (("index", "samples", "--index", "samples/bfl_plain.safetensors"), "cannot be used"),
        (("search", "fox", "--folder", "samples"), "no index"),
        (("search", "--folder", "samples"), "expected a prompt or --like"),
        (("search", " ", "--folder", "samples"), "expected a prompt or --like"),
        (("search", "fox", "--like", "x", "--folder", "samples"), "not both"),
        (("search", "--like", "x", "--folder", "samples"), "no index"),
        (("search", "fox", "--folder", "empty"), "no index"),
        (("search", "fox", "--folder", "samples", "--text_encoder", "x", "--encoder", "e"), "'x'"),
    ],
)
def test_faulty_calls(words, expected, refusal):
    assert expected in refusal(*words)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("--k", "0"), "--k is 0"),
        (("--like", "bfl_plain", "--k", "-1"), "--k is -1"),
        (("--family", "typo"), "--family is 'typo'"),
        (("--like", "bfl_plai"), "did you mean bfl_plain"),
    ],
)
def test_faulty_searches(words, expected, call, refusal):
    call("index", "samples", "--no_encode")
    prompt = () if "--like" in words else ("fox",)
    options = (*prompt, "--folder", "samples", "--text_encoder", "ngrams", *words)
    assert expected in refusal("search", *options)
