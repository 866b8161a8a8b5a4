"""``gates diffusion generate`` on a small base of random weights."""

import json
import math
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image
from safetensors.torch import load_file, save_file

from apps.diffusion.generate import Sampling, name_of, record_of
from apps.diffusion.studio import DRAWS, USED, Studio
from apps.main import main
from core_gates.errors import GatesError
from diffusion.data.concepts import concepts
from diffusion.data.pictures import parameters_of
from diffusion.experiments.trained_gates import FILE
from diffusion.fusion.pipeline import Generated
from diffusion.library import Results
from diffusion.lora_file import FluxShape
from diffusion.models.embedded_base import PatchAutoencoder
from diffusion.models.text_encoders import text_encoder
from diffusion.retrieval.encoder import LoraWeightEncoder
from diffusion.retrieval.encoder_config import EncoderConfig
from diffusion.retrieval.encoder_folder import save_encoder

HERE = ("--base", "base", "--library", "loras", "--steps", "2")
GATED = (*HERE, "--gates", "gates.safetensors")
UNIT = {"num_heads": 2, "head_dim": 16, "in_channels": 48, "context_dim": 384, "pooled_dim": 384}
UNIT["guidance"] = False


@pytest.fixture
def made(small_world, gates):
    """Make images and return the folder's records by name, and what was printed."""

    def call(output, *words):
        printed = gates("generate", *words, "--output", output)
        records = {
            p.stem: json.loads(p.read_text()) for p in sorted((small_world / output).glob("*.json"))
        }
        return records, printed

    return call


def test_the_same_seed_gives_the_same_bytes(made, small_world):
    (first,), printed = made("one", "a", "red", "fox", "--k", "2", *GATED)
    made("two", "a", "red", "fox", "--k", "2", *GATED)
    for suffix in (".png", ".json"):
        one, two = ((small_world / f / f"{first}{suffix}").read_bytes() for f in ("one", "two"))
        assert one == two
    other, _ = made("three", "a red fox", "--k", "2", *GATED, "--seed", "1")
    pixels = {
        (small_world / "one" / f"{first}.png").read_bytes(),
        (small_world / "three" / f"{next(iter(other))}.png").read_bytes(),
    }
    assert len(pixels) == 2
    assert first.startswith("a-red-fox-s0-")
    assert "only metadata is searched" in printed
    assert "words: red, fox" in printed


def test_chunk_and_record_hold_what_made_the_image(made, small_world):
    records, printed = made(
        "out", "night sky", "--adapters", "night:0.5,snow", *GATED, "--guidance", "2",
        "--roles", "snow:style",
    )  # fmt: skip
    assert "note: --roles changes nothing: " in printed
    ((name, record),) = records.items()
    with Image.open(small_world / "out" / f"{name}.png") as image:
        assert (image.size, image.text["parameters"]) == ((32, 32), parameters_of(record))
    assert (
        "night sky <lora:night:0.5> <lora:snow:1>\nSteps: 2, Sampler: Euler, CFG scale: 2.0"
        in image.text["parameters"]
    )
    assert (record["seed"], record["mode"], record["model"]) == (0, "gated", "base")
    night, snow = record["adapters"]
    assert (night["strength"], night["score"], night["why"]) == (0.5, None, "it was named")
    assert (snow["title"], len(snow["sha256"])) == ("deep snow", 64)
    assert set(record["gates"]) == {"night", "snow"}
    assert 0 < night["open"] < 1
    assert f"{night['open']:.3f}" in printed
    assert len(record["gates"]["night"]["by_step"]) == 2
    assert "blocks.0.ff_a.2" in record["gates"]["night"]["by_layer"]
    assert {n: len(d or "") for n, d in record["hashes"].items()} == {
        "base": 16,
        "gates": 16,
        "encoder": 0,
    }


def test_modes_make_different_images(made, small_world):
    seen = {}
    for mode in ("gated", "sum", "mean", "switch", "k_lora"):
        ((name, record),) = made(mode, "snow", "--adapters", "fox,snow", *GATED, "--mode", mode)[
            0
        ].items()
        assert (record["mode"], record["gates"] is None) == (mode, mode != "gated")
        with Image.open(small_world / mode / f"{name}.png") as image:
            seen[mode] = image.tobytes()
    ((name, record),) = made("none", "snow", "--adapters", "none", *GATED)[0].items()
    assert record["adapters"] == []
    with Image.open(small_world / "none" / f"{name}.png") as image:
        seen["none"] = image.tobytes()
    assert len(set(seen.values())) == len(seen)


def test_many_images_have_a_sheet(made, small_world):
    records, printed = made("out", "snow", "--k", "1", *GATED, "--count", "3", "--seed", "5")
    sheet = next(name for name in records if name.endswith("-sheet"))
    assert sorted(r["seed"] for n, r in records.items() if n != sheet) == [5, 6, 7]
    assert records[sheet]["seeds"] == [5, 6, 7]
    assert {f"{name}.png" for name in records if name != sheet} == set(records[sheet]["files"])
    with Image.open(small_world / "out" / f"{sheet}.png") as image:
        assert image.size == (260, 260)
    assert printed.splitlines()[-1] == f"out/{sheet}.png"


def test_the_encoder_finds_by_weights(made, small_world):
    shape = FluxShape(num_layers=1, num_single_layers=1, **UNIT)
    encoder = LoraWeightEncoder(EncoderConfig(shape, text_dim=384))
    save_encoder("encoder", encoder, text_fingerprint=text_encoder("ngrams").fingerprint)
    options = (*GATED, "--encoder", "encoder")
    records, printed = made("low", "winter", *options, "--least", "1")
    (record,) = records.values()
    assert (record["adapters"], record["mode"], len(record["left_out"])) == ([], "none", 3)
    assert "no adapters: the base alone" in printed
    for name, score in record["left_out"].items():
        assert f"left out: {name} {score:.3f}, below 1.000".replace("0.", ".", 1) in printed
    records, printed = made("out", "snow", "--k", "3", *options, "--least=-1")
    (record,) = records.values()
    assert record["left_out"] == {}
    assert all(one["score"] == one["weights"] for one in record["adapters"])
    assert record["hashes"]["encoder"]
    assert "cosine of its weights and the prompt" in printed
    records, printed = made("named", "deep snow", *options, "--least", "1")
    (record,) = records.values()
    assert [one["name"] for one in record["adapters"]] == ["snow"]
    assert "named: deep snow" in printed


@pytest.mark.fault("diffusion D6")
def test_an_interrupt_keeps_what_was_made(small_world, monkeypatch, capsys):
    make, seeds = Studio.make, []

    def interrupted(self, *words, seed, **options):
        seeds.append(seed)
        if len(seeds) == 3:
            raise KeyboardInterrupt
        return make(self, *words, seed=seed, **options)

    monkeypatch.setattr(Studio, "make", interrupted)
    assert main([*call("--count", "50", "--k", "1", "--output", "out")]) == 130
    printed = capsys.readouterr().out.splitlines()
    kept = [
        json.loads(path.read_text())["seed"]
        for path in sorted((small_world / "out").glob("*.json"))
    ]
    assert sorted(kept) == [0, 1]
    for path in (small_world / "out").glob("*.png"):
        assert f"out/{path.name}" in printed
        with Image.open(path) as image:
            image.load()
    assert len(list((small_world / "out").iterdir())) == 4


@pytest.mark.fault("diffusion D5")
@pytest.mark.parametrize("where", ["latents", "pixels"])
def test_images_that_are_not_finite_are_refused(
    where, small_world, faulty_inputs, monkeypatch, gates
):
    if where == "pixels":
        decode = PatchAutoencoder.decode

        def broken(self, *words, **more):
            return (decode(self, *words, **more)[0] * math.nan,)

        monkeypatch.setattr(PatchAutoencoder, "decode", broken)
    else:
        own = load_file("loras/snow.safetensors")
        save_file({n: t * 1e30 for n, t in own.items()}, "loras/snow.safetensors", {"a": "b"})
    gates("index", "loras")
    named = call("--adapters", "snow", "--output", "out")
    huge = call("--adapters", "snow:1e9", "--output", "out")
    faulty_inputs(
        {
            "NaN": (named, f"{where} of .* are not finite: lower the strengths of the adapters"),
            "huge": (huge, "'1e9', expected a finite number, at most 1000 in size"),
        },
        folder=small_world,
    )
    assert not list((small_world / "out").glob("*"))


def call(*words, prompt="snow", given=GATED):
    return ("diffusion", "generate", *prompt.split(), *given, *words)


def test_faulty_calls(small_world, gates, faulty_inputs, write):
    (small_world / "broken").mkdir()
    (small_world / "broken/a.safetensors").write_text("no")
    for folder in ("loras", "broken"):
        gates("index", folder)
    shape = FluxShape(num_layers=2, num_single_layers=1, **UNIT)
    same = FluxShape(num_layers=1, num_single_layers=1, **UNIT)
    text = text_encoder("ngrams").fingerprint
    save_encoder(
        "deeper", LoraWeightEncoder(EncoderConfig(shape, text_dim=384)), text_fingerprint=text
    )
    save_encoder(
        "worded", LoraWeightEncoder(EncoderConfig(same, text_dim=384)), text_fingerprint="0" * 16
    )
    (small_world / "empty").mkdir()
    (small_world / "other").mkdir()
    save_file(load_file("gates.safetensors"), "other/gates.safetensors")
    record = {"fingerprint": "", "identity": {}, "settings": {}, "facts": {"base": "f" * 16}}
    (small_world / "other/record.json").write_text(json.dumps(record))
    without = ("--base", "base", "--steps", "2")
    faulty_inputs(
        {
            "an empty prompt": (call(prompt=""), "the prompt is empty"),
            "a blank prompt": (("diffusion", "generate", " ", *GATED), "the prompt is empty"),
            "an empty library": (call("--library", "empty"), "empty holds no adapter"),
            "a library of other files": (
                call("--library", "broken"), "broken holds no adapter, a.safetensors",
            ),
            "no library": (call("--library", "nowhere"), "nowhere"),
            "a library for another base": (call(given=without), "give --library FOLDER for base"),
            "an unknown adapter": (call("--adapters", "foxx"), "did you mean fox"),
            "an adapter of no such name": (
                call("--adapters", "zzz"), "has no adapter 'zzz': there are fox, ",
            ),
            "adapters twice": (call("--adapters", "fox,fox"), "names 'fox' twice"),
            "adapters without a name": (call("--adapters", "fox,,"), "expected names such as"),
            "a mode of other gates": (call("--mode", "relevance"), "is for --mode gated, not rel"),
            "a mode without gates": (
                call("--mode", "relevance", given=HERE), "run `gates diffusion evaluate --config",
            ),
            "k of 0": (call("--k", "0"), "--k is 0, expected 1 or more"),
            "k and adapters": (call("--k", "1", "--adapters", "fox"), "exclude each other"),
            "a strength that is no number": (call("--adapters", "fox:nan"), "strength 'nan'"),
            "gates of other layers": (call("--gates", "loras/fox.safetensors"), "gates of layers"),
            "no gates": (call("--gates", "nowhere.safetensors"), "nowhere.safetensors cannot be"),
            "gates of another base": (call("--gates", "other/gates.safetensors"), "another base"),
            "an encoder of another base": (call("--encoder", "deeper"), "adapters of another base"),
            "an encoder of other texts": (call("--encoder", "worded"), "was trained with the text"),
            "no encoder": (call("--encoder", "nowhere"), "nowhere"),
            "an output below a file": (call("--output", "gates.safetensors/a"), "is a file"),
            "an unknown mode": (call("--mode", "best"), "--mode is 'best'"),
            "a mode that is trained": (call("--mode", "x_lora"), "has to be trained first"),
            "steps of 0": (call("--steps", "0"), "--steps is 0"),
            "a negative seed": (call("--seed", "-1"), "--seed is -1"),
            "guidance that is no number": (call("--guidance", "nan"), "expected float"),
            "negative guidance": (call("--guidance", "-1"), "--guidance is -1.0"),
            "no images": (call("--count", "0"), "--count is 0"),
            "guidance that does nothing": (call("--guidance", "0.5"), "takes for 1"),
            "a negative prompt that does nothing": (
                call("--guidance", "1", "--negative_prompt", "rain"), "give --guidance above 1",
            ),
            "a size of the embedded base": (
                call("--size", "64", "--library", "none"), "images of 32 pixels",
            ),
            "guidance before the library": (
                call("--guidance", "0.5", "--library", "none"), "takes for 1",
            ),
            "an embedded base that is moved": (
                call("--offload", "group"), "computes in float32 and is never moved: leave both",
            ),
            "a least cosine": (call("--least", "0.1"), "--least is 0.1, expected a cosine"),
            "a dtype of the embedded base": (call("--dtype", "bfloat16"), "computes in float32"),
            "a prompt of bytes": (call(prompt="caf\udcff"), "not in UTF-8 at letter 4"),
            "no base": (call("--base", "nowhere"), "nowhere holds no pipeline"),
        },
        folder=small_world,
    )  # fmt: skip


@pytest.mark.parametrize(("family", "guided"), [("flux", False), ("sd3", True)])
def test_options_that_a_base_ignores_are_refused(family, guided):
    studio = Studio(SimpleNamespace(family=family), None, None, None, {}, "other", "bfloat16")
    assert Sampling(guidance=3.5, size=64).options(studio)["guidance_scale"] == 3.5
    assert studio.guided == guided
    given = {"guidance": 3.5, "negative_prompt": "rain"}
    if guided:
        assert Sampling(**given).options(studio)["negative_prompt"] == "rain"
        with pytest.raises(GatesError, match="takes for 1"):
            Sampling(guidance=0).options(studio)
        return
    assert Sampling(guidance=0).options(studio)["guidance_scale"] == 0
    with pytest.raises(GatesError, match="this base has none"):
        Sampling(**given).options(studio)


def test_numbers_of_other_bases_are_in_the_record():
    finder = SimpleNamespace(described=lambda name, prompt: {}, found=Results((), ""))
    made = Generated([], "snow", 0, "sum", (), {}, None, {})
    records = [
        record_of(Studio(None, finder, None, None, {}, "other", dtype), made, "sum")
        for dtype in ("float32", "bfloat16")
    ]
    assert [one["dtype"] for one in records] == ["float32", "bfloat16"]
    assert name_of(records[0]) != name_of(records[1])


def test_gates_that_lack_their_common_adapter_say_so(made, small_world):
    (small_world / "common").mkdir()
    shutil.copy(small_world / "gates.safetensors", small_world / "common")
    record = {"fingerprint": "", "identity": {}, "settings": {"global_rank": 2}, "facts": {}}
    (small_world / "common" / "record.json").write_text(json.dumps(record))
    _, printed = made("out", "snow", *HERE, "--gates", "common/gates.safetensors")
    assert "one more adapter, what all have in common in rank 2" in printed
    assert "one more adapter" not in made("out", "snow", *GATED)[1]


def test_gates_that_were_trained_here_are_named(gates, samples, zoo_root, write, monkeypatch):
    monkeypatch.setattr("apps.diffusion.embedded_world.World", write.world_of)
    words = ("generate", "snow", "--root", zoo_root, "--index", "index", "--output", "out",
             "--steps", "1", "--adapters", concepts()[0].name)  # fmt: skip
    own = zoo_root.joinpath(
        "diffusion", *USED["relevance"][:1], "gates", USED["relevance"][1], FILE
    )
    line = f"note: the gates are {own}, trained in this run folder, not those that ship"
    assert line in gates(*words)
    assert line not in gates(*words, "--mode", "sum")
    shutil.copy(own, "shipped.safetensors")
    assert "the gates are" not in gates(*words, "--gates", "shipped.safetensors")
    monkeypatch.setattr("apps.diffusion.studio._gates", lambda *_: Path("shipped.safetensors"))
    assert "the gates are" not in gates(*words)


def test_an_output_that_cannot_be_written_is_refused_before_anything_is_made(
    small_world, faulty_inputs, monkeypatch
):
    monkeypatch.setattr(Studio, "make", lambda *_, **__: pytest.fail("an image is made"))
    words = "cannot be written.*: choose another --output"
    places = ("/proc/images", "gates.safetensors", "gates.safetensors/a")
    faulty_inputs({p: (call("--output", p), words) for p in places}, folder=small_world)


def test_what_ships_is_named_where_it_is_missing(small_world, faulty_inputs, monkeypatch):
    from apps.diffusion import studio
    from apps.diffusion.studio import Shipped

    monkeypatch.setattr(studio, "shipped", lambda world: Shipped(None, {}, None, {}))
    monkeypatch.setattr("apps.diffusion.embedded_world.World", lambda root: None)
    words = "the embedded base is missing"
    faulty_inputs({"nothing ships": (call(given=()), words)}, folder=small_world)
    found = Shipped(small_world / "base", {}, None, {})
    monkeypatch.setattr(studio, "shipped", lambda world: found)
    words = "the shipped adapters are missing"
    faulty_inputs({"no zoo ships": (call(given=()), words)}, folder=small_world)


@pytest.mark.fault("46 D4")
@pytest.mark.parametrize(
    ("prompt", "scores", "told"),
    [
        ("photo of a labrador puppy", {}, True),
        ("photo of a labrador, in night", {"night": 0.4}, True),  # a style is no thing
        ("two red hearts", {}, False),
        ("a red fox", {"fox": 0.3}, False),
        ("a puppy", {"fox": 0.3}, True),  # found, but not named
        ("a puppy", {"fox": None}, False),
    ],
)
def test_a_prompt_beyond_the_base_is_told_what_it_draws(prompt, scores, told):
    tags = {"fox": ("subject",), "night": ("style", "night")}
    matches = [SimpleNamespace(name=n, named=n if n in prompt else "") for n in scores]
    finder = SimpleNamespace(
        found=matches, library=SimpleNamespace(find=lambda n: SimpleNamespace(tags=tags[n]))
    )
    studio = Studio(None, finder, object(), None, {}, "")
    assert studio.unknown(prompt, scores) == (DRAWS if told else "")
    assert "circle, square" in DRAWS
    assert Studio(None, finder, None, None, {}, "").unknown(prompt, scores) == ""
