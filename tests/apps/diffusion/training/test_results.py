"""What training verbs write, also after a kill."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from apps.main import main
from core_gates.errors import GatesError
from diffusion.data.pictures import captioned_images, read_image
from diffusion.evaluation.fusion_scores import fixed_losses
from diffusion.experiments.trained_gates import base_digest, refuse_gates_of_another
from diffusion.experiments.zoo import with_trigger
from diffusion.fusion import GatedFusion
from diffusion.lora_file import load_lora
from diffusion.models.embedded_base import EmbeddedBase, transformer_of
from diffusion.models.text_encoders import text_encoder
from diffusion.retrieval import load_encoder


@pytest.fixture
def gates(place, capsys):
    """Run ``gates`` and return what it prints."""

    def run(*words):
        assert main([*map(str, words)]) == 0
        return capsys.readouterr().out

    return run


def last(printed):
    return printed.strip().splitlines()[-1]


def test_an_adapter_is_read_by_us_and_by_diffusers(gates, command, place):
    words = command("train-lora", "--trigger", "zyx", "--tags", "fruit,toy", "--license", "CC0-1.0")
    path = last(gates(*words))
    assert path.endswith("loras/My-fruit-s0/My-fruit.safetensors")
    bundle, base = load_lora(path), EmbeddedBase.load("base")
    assert (bundle.family, set(bundle.ranks().values())) == ("flux", {2})
    found = bundle.metadata
    assert found["modelspec.title"] == "My fruit"
    assert found["modelspec.architecture"] == "flux-tiny/lora"
    assert (found["modelspec.trigger_phrase"], found["modelspec.license"]) == ("zyx", "CC0-1.0")
    assert json.loads(found["ss_tag_frequency"])["My-fruit"]["zyx"] == 8
    shown = gates("diffusion", "inspect", path)
    assert all(word in shown for word in ("zyx", "CC0-1.0", "My fruit"))
    pipe = base.pipeline()
    layer = pipe.transformer.transformer_blocks[0].attn.to_q
    x, before = torch.randn(3, 32), layer.weight.clone()
    with GatedFusion(pipe.transformer, {"a": bundle}, mode="sum"):
        expected = pipe.transformer.transformer_blocks[0].attn.to_q(x)
    pipe.load_lora_weights(path)
    found = pipe.transformer.transformer_blocks[0].attn.to_q(x)
    assert not torch.allclose(found, x @ before.mT + layer.bias, atol=1e-5)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_a_base_learns_from_a_folder_of_images(gates, command, place):
    path = Path(last(gates(*command("train-base", "--images", "images", steps=60))))
    base, images = EmbeddedBase.load(path), captioned_images("images")
    latents = base.latents(torch.stack([read_image(one.path, 32) for one in images]))
    text = base.encoder().encode([one.caption for one in images])
    losses = [
        fixed_losses(model, None, latents, text, steps=4).mean()
        for model in (base.transformer, transformer_of("unit"))
    ]
    assert losses[0] < 0.9 * losses[1]
    record = json.loads((path / "record.json").read_text())
    assert (record["settings"]["count"], record["facts"]["scenes"]) == (8, 8)


def test_an_encoder_indexes_and_finds(gates, command):
    folder = last(gates(*command("train-retriever", "--batch_size", "2", steps=4)))
    encoder = load_encoder(folder, text_fingerprint=text_encoder("ngrams").fingerprint)
    assert encoder.family == "flux"
    shown = gates("diffusion", "index", ".", "--encoder", folder)
    assert "4" in next(line for line in shown.splitlines() if "encoded now" in line)
    shown = gates(
        "diffusion", "search", "a red apple", "--encoder", folder, "--text_encoder", "ngrams",
        "--least", "-1",
    )  # fmt: skip
    assert "by names, then weights" in shown


@pytest.mark.parametrize(
    "options",
    [
        (),
        ("--variant", "no_base", "--initialization", "published", "--factors", "false"),
        ("--time", "film", "--global_rank", "1", "--weight_decay", "0.01", "--schedule", "cosine"),
        (
            "--factors",
            "true",
            "--role_fraction",
            "1",
            "--roles",
            "a0.safetensors:subject",
            "--weight_rate",
            "0.01",
        ),
        ("--what", "strengths", "--role_fraction", "0.5"),
    ],
)
def test_gates_are_loaded_and_baked(options, gates, command, place):
    path = last(gates(*command("train-gates", *options, steps=3)))
    base = EmbeddedBase.load("base")
    adapters = {name: load_lora(f"{name}.safetensors") for name in ("a0", "a1")}
    trained = GatedFusion(base.transformer, adapters, gates=path)
    plain = GatedFusion(base.transformer, adapters, mode="sum")
    text = text_encoder("ngrams").encode(["a red apple"])
    empty, images = text_encoder("ngrams").encode([""]), []
    for fusion in (trained, plain):
        with fusion:
            images.append(base.images(text, empty, seeds=[0], steps=2))
    assert not torch.equal(*images)
    gates(
        "diffusion", "merge", "a0.safetensors", "a1.safetensors", "--method", "baked", "--gates",
        path, "--base", "base", "--output", "baked.safetensors", "--prompts", "a red apple",
        "--steps", "1", *(("--roles", "a0:subject,a1:style") if "--roles" in options else ()),
    )  # fmt: skip
    assert load_lora("baked.safetensors").modules


def test_gates_begin_at_strengths_and_roles_are_those_that_were_told(gates, command, place):
    told = ("--role_fraction", "1", "--roles", "a0.safetensors:subject,a1.safetensors:style")
    path = last(gates(*command("train-gates", "--what", "strengths", *told, steps=3)))
    strengths = load_file(path)
    assert {name.rpartition(".")[2] for name in strengths} == {"factors"}
    moved = torch.stack([*strengths.values()]).float() - torch.tensor([1.0, 0.0, 0.0])
    assert (moved.abs().amax(0)[0] > 0).all()  # two adapters: any, subject, style
    assert not moved[:, 1].any()  # never more
    path = last(gates(*command("train-gates", "--begin", path,
                               "--learning_rate", "1e-9", steps=2)))  # fmt: skip
    begun = load_file(path)
    for name, factors in strengths.items():
        assert torch.equal(begun[name], factors)
    made = ("diffusion", "generate", "a red apple", "--library", ".", "--steps", "1", "--base",
            "base", "--adapters", "a0,a1", "--gates", path)  # fmt: skip
    images = []
    for number, roles in enumerate(("a0:subject,a1:style", "a1:subject,a0:style")):
        gates(*made, "--roles", roles, "--output", f"out{number}")
        (record,) = Path(f"out{number}").glob("*.json")
        images.append(record.with_suffix(".png").read_bytes())
        found = {one["name"]: one["role"] for one in json.loads(record.read_text())["adapters"]}
        assert found == dict(part.split(":") for part in roles.split(","))
    assert images[0] != images[1]


def test_a_table_may_name_several_adapters(gates, command, place, table, made):
    rows = [["a0.safetensors; a1.safetensors", *made.rows[0][1:]], *made.rows[1:4]]
    table(place / "table.csv", rows)
    printed = gates(*command("train-gates", "--partners", "1", steps=2))
    record = json.loads((place / last(printed)).with_name("record.json").read_text())
    assert record["facts"]["combinations"] == 4


def test_results_of_tables_are_apart_from_those_of_the_zoo(gates, command, place):
    for verb, kind in (("train-gates", "gates"), ("train-retriever", "encoders")):
        path = Path(last(gates(*command(verb, steps=2))))
        run = next(one for one in path.parents if one.parent.name == "diffusion")
        assert sorted(one.name for one in run.iterdir() if kind in one.name) == [f"table_{kind}"]


def test_gates_of_a_table_know_their_base(gates, command, place, capsys):
    path = last(gates(*command("train-gates", steps=2)))
    made = ("diffusion", "generate", "a red apple", "--library", ".", "--steps", "1",
            "--output", "out", "--adapters", "a0,a1", "--gates", path)  # fmt: skip
    gates(*made, "--base", "base")
    shutil.copytree("base", "other")
    weights = load_file("other/result.safetensors")
    save_file({name: one * 1.01 for name, one in weights.items()}, "other/result.safetensors")
    assert main([*made, "--base", "other"]) == 2
    assert "was trained on another base" in capsys.readouterr().err
    made = (
        "diffusion", "merge", "a0.safetensors", "a1.safetensors", "--method", "baked",
        "--gates", path, "--base", "other", "--output", "b.safetensors", "--prompts", "a",
    )  # fmt: skip
    assert main(made) == 2
    assert "was trained on another base" in capsys.readouterr().err


def test_gates_of_a_pipeline_know_its_transformer(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name / "transformer").mkdir(parents=True)
        (tmp_path / name / "model_index.json").write_text(name)
        (tmp_path / name / "transformer" / "weights.safetensors").write_text(name)
    one, two, gates = tmp_path / "one", tmp_path / "two", tmp_path / "gates.safetensors"
    facts = {"base": base_digest(one)}
    record = {"fingerprint": "", "identity": {}, "settings": {}, "facts": facts}
    (tmp_path / "record.json").write_text(json.dumps(record))
    (one / "model_index.json").write_text("a pipeline of the same transformer")
    refuse_gates_of_another(one, gates)
    refuse_gates_of_another(tmp_path / "flux.gguf", gates)
    with pytest.raises(GatesError, match=r"was trained on another base .*: give the gates of"):
        refuse_gates_of_another(two, gates)


def test_other_settings_need_another_name(gates, command, place, capsys):
    first = last(gates(*command("train-lora", steps=2)))
    assert main(command("train-lora", steps=3)) == 2
    assert "was made with other settings (steps 2, now 3)" in capsys.readouterr().err
    assert last(gates(*command("train-lora", "--name", "new", steps=3))) != first
    assert last(gates(*command("train-lora", "--overwrite", steps=3))) == first


@pytest.mark.parametrize(
    ("caption", "trigger", "expected"),
    [
        ("a catalog", "cat", "cat, a catalog"),
        ("a Cat.", "cat", "a Cat."),
        ("", "cat", "cat"),
        ("a dog", "", "a dog"),
        ("in c++ style", "c++", "in c++ style"),
    ],
)
def test_a_trigger_is_words_not_letters(caption, trigger, expected):
    assert with_trigger(caption, trigger) == expected


RESULTS = {
    "train-base": "bases/*/result.safetensors",
    "train-lora": "loras/*/My-fruit.safetensors",
    "train-retriever": "table_encoders/*/encoder/encoder.safetensors",
    "train-gates": "table_gates/*/gates.safetensors",
}


@pytest.mark.costly("four processes that train")
@pytest.mark.parametrize(
    "verb",
    [
        "train-gates",
        pytest.param("train-lora", marks=pytest.mark.slow),
        pytest.param("train-base", marks=pytest.mark.slow),
        pytest.param("train-retriever", marks=pytest.mark.slow),
    ],
)
def test_a_killed_training_ends_with_the_same_bits(verb, kill_and_resume, forked, command, place):
    folder = kill_and_resume(
        command(verb, steps=8),
        app="diffusion",
        compare=[RESULTS[verb], "*/*/record.json"],
        kills=1,
    )
    root, name = str(folder.parents[1]), folder.name
    again = forked.finished([*command(verb, steps=8), "--root", root, "--name", name])
    assert len(again.splitlines()) == 1
    assert again.strip().startswith(str(folder))
