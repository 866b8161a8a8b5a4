"""The commands and the table of the pages of image models, as ``gates diffusion`` answers them."""

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import FluxPipeline
from safetensors.torch import save_file

from diffusion.models.embedded_base import EmbeddedBase
from diffusion.models.text_encoders import text_encoder

DOCS = Path(__file__).parents[3] / "docs"
PAGE = (DOCS / "guide/diffusion.md").read_text()
FORMATS = (DOCS / "reference/lora_files.md").read_text()
ROWS = re.findall(r"^\| (.+?) \| `(.+?)` \| (\w+)(?:: (.+?))? \|$", FORMATS, re.MULTILINE)
UP = (
    ("lora_A", "lora_B"),
    ("lora_down", "lora_up"),
    ("lora1.down", "lora1.up"),
    ("lora.down", "lora.up"),
    ("layer.down", "layer.up"),
)
WIDTH = 16
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
BLOCKS = [b.replace("\\\n", " ") for kind, b in FENCE.findall(PAGE + FORMATS) if not kind]
FILES = {"style": "kohya_flux_full", "subject": "xlabs"}


def tensors_of(key):
    """The tensors of one layer, named like the key."""
    rows = 3 * WIDTH if "qkv" in key else WIDTH
    stem, _, end = key.rpartition(".")
    if end == "hada_w1_a":
        shapes = {"hada_w1_a": (rows, 2), "hada_w1_b": (2, WIDTH), "hada_w2_a": (rows, 2)}
        shapes |= {"hada_w2_b": (2, WIDTH), "alpha": ()}
    elif end == "lokr_w1":
        shapes = {"lokr_w1": (4, 4), "lokr_w2": (rows // 4, 4), "alpha": ()}
    elif end in ("dora_scale", "lora_magnitude_vector"):
        pair = ("lora_down", "lora_up") if end == "dora_scale" else ("lora_A", "lora_B")
        size = (rows, 1) if end == "dora_scale" else (rows,)
        shapes = {f"{pair[0]}.weight": (2, WIDTH), f"{pair[1]}.weight": (rows, 2), end: size}
    else:
        down, up = next(pair for pair in UP if pair[0] in key)
        return {key: torch.ones(2, WIDTH), key.replace(down, up): torch.ones(rows, 2)}
    return {f"{stem}.{name}": torch.ones(shape) for name, shape in shapes.items()}


def test_all_dialects_have_a_row():
    assert len(ROWS) >= 17
    assert {effect for _, _, effect, _ in ROWS} == {"all", "part", "nothing", "error"}


@pytest.mark.parametrize(("name", "key", "effect", "what"), ROWS, ids=[row[1] for row in ROWS])
def test_row(name, key, effect, what, gates, tmp_path):
    save_file(tensors_of(key), "a.safetensors")
    gates("inspect", "a.safetensors", "--json", "a.json")
    (entry,) = json.loads((tmp_path / "a.json").read_text())["files"]
    assert entry["left_out"] == {}
    (loader,) = entry["loaders"]
    assert {"whole": "all"}.get(loader["effect"], loader["effect"]) == effect
    assert loader["what"] == what


@pytest.fixture
def reader(gates, samples, tmp_path, monkeypatch):
    """The folder of a reader of the pages."""
    monkeypatch.setenv("COLUMNS", "100")
    for name, sample in FILES.items():
        shutil.copy(samples / f"{sample}.safetensors", tmp_path / f"{name}.safetensors")
    samples.rename(tmp_path / "loras")
    (tmp_path / "diffusion").symlink_to(DOCS.parent / "diffusion")  # adapters that ship
    return gates


@pytest.mark.costly("makes seven images")
def test_every_command_of_the_pages_runs(reader, tmp_path):
    lines = [line for block in BLOCKS for line in block.splitlines() if "gates diffusion" in line]
    commands = [shlex.split(line.removeprefix("$ "), comments=True) for line in lines]
    commands = [words for words in commands if words[0] == "gates"]
    assert {words[2] for words in commands} >= {"generate", "index", "inspect", "convert", "merge"}
    for words in commands:
        quick = ("--steps", "3") if words[2] == "generate" else ()
        assert reader(*words[2:], *quick)
    outputs = [
        word for words in commands for word in words[3:] if word.startswith(("small", "for"))
    ]
    assert len(outputs) == 6
    assert all((tmp_path / output).exists() for output in outputs)


class Pipe:
    """A FLUX.1 that is given prompts, and is small."""

    def __init__(self, base):
        self.inner, self.transformer = base.pipeline(), base.transformer

    def __call__(self, prompt, num_inference_steps=2, **options):
        words = text_encoder("ngrams").encode([prompt])
        return self.inner(
            prompt_embeds=words.tokens, pooled_prompt_embeds=words.pooled, height=32, width=32,
            num_inference_steps=num_inference_steps, **options,
        )  # fmt: skip


def test_adapters_and_gates_on_an_ordinary_pipeline(small_world, monkeypatch, capsys):
    base = EmbeddedBase.load(small_world / "base")
    monkeypatch.setattr(FluxPipeline, "from_pretrained", lambda *_, **options: Pipe(base))
    for name, sample in (("subject", "fox"), ("style", "snow")):
        shutil.copy(small_world / f"loras/{sample}.safetensors", f"{name}.safetensors")
    shutil.copy(small_world / "gates.safetensors", "flux_gates.safetensors")
    first, second = [body for kind, body in FENCE.findall(PAGE) if kind == "py"]
    names = {}
    before = {name: t.clone() for name, t in base.transformer.state_dict().items()}
    exec(compile(first, "first", "exec"), names)
    assert names["image"].size == (32, 32)
    assert names["fused"].strengths == {"subject": 1.0, "style": 0.8}
    assert names["image"].tobytes() != names["pipe"]("a red fox in snow").images[0].tobytes()
    assert all(torch.equal(before[name], t) for name, t in base.transformer.state_dict().items())
    exec(compile(second, "second", "exec"), names)
    assert capsys.readouterr().out.startswith("[('fox', 0.5)] {'fox': 0.")


def test_the_printed_answer_is_what_is_printed(reader):
    (shown,) = [block for block in BLOCKS if block.startswith("$ gates diffusion convert")]
    convert, command, expected = shown.split("\n", 2)
    reader(*shlex.split(convert)[3:])
    printed = reader(*shlex.split(command)[3:])
    assert [line.rstrip() for line in printed.splitlines()] == expected.splitlines()
