"""A base of unit size with adapters, images and a table, all made up."""

import csv
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from diffusion.data.published_table import COLUMNS
from diffusion.lora_file import Factors, LoraBundle, save_lora
from diffusion.models.embedded_base import EmbeddedBase, PatchAutoencoder, transformer_of
from diffusion.models.flow_matching import layers_of
from diffusion.models.text_encoders import text_encoder

WORDS = ("a red apple", "a blue boat", "green grass", "a yellow sun")


def adapter(model, seed, rank=2):
    draw = torch.Generator().manual_seed(seed)
    modules = {}
    for name in layers_of(model, ("attention", "mlp")):
        layer = model.get_submodule(name)
        modules[name] = Factors(
            torch.randn(rank, layer.in_features, generator=draw) * 0.1,
            torch.randn(layer.out_features, rank, generator=draw) * 0.1,
        )
    return LoraBundle("flux", modules, metadata={"modelspec.title": f"a{seed}"})


def unit_base(folder):
    torch.manual_seed(0)
    images = torch.rand(64, 3, 32, 32) * 2 - 1
    named = {"name": "ngrams", "fingerprint": text_encoder("ngrams").fingerprint}
    base = EmbeddedBase(transformer_of("unit"), PatchAutoencoder.fitted(images), named)
    folder.mkdir()
    base.save(folder)
    return base


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    """A folder with ``base``, ``images`` with captions, ``a0.safetensors`` … and ``table.csv``."""
    folder = tmp_path_factory.mktemp("made")
    base = unit_base(folder / "base")
    draw = np.random.default_rng(0)
    (folder / "images").mkdir()
    rows = []
    for number in range(8):
        pixels = draw.integers(0, 255, (40, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "images" / f"{number}.png")
        text = f"{WORDS[number % 4]} {number}"
        (folder / "images" / f"{number}.txt").write_text(text)
        rows.append([f"a{number % 4}.safetensors", f"images/{number}.png", text, text[:6], ""])
    for number in range(4):
        save_lora(adapter(base.transformer, number), folder / f"a{number}.safetensors")
    write_table(folder / "table.csv", rows)
    return SimpleNamespace(folder=folder, rows=rows)


def write_table(path, rows, columns=COLUMNS):
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([columns, *rows])
    return path


@pytest.fixture(scope="session")
def table():
    """Write a table."""
    return write_table


@pytest.fixture
def place(made, tmp_path, monkeypatch):
    """The working folder, with a copy of what was made."""
    folder = tmp_path / "work"
    shutil.copytree(made.folder, folder)
    monkeypatch.chdir(folder)
    monkeypatch.setenv("COLUMNS", "160")
    return folder


BASE = ("--base", "base", "--seed", "0")
COMMANDS = {
    "train-base": ("--shape", "unit", "--text_encoder", "ngrams", "--batch_size", "8"),
    "train-lora": ("images", *BASE, "--rank", "2", "--batch_size", "4", "--title", "My fruit"),
    "train-retriever": ("--csv", "table.csv", *BASE, "--held_out", "0.3"),
    "train-gates": ("--csv", "table.csv", *BASE, "--batch_size", "4", "--contrast"),
}
"""Verb -> its shortest sensible options, without steps."""


@pytest.fixture(scope="session")
def command():
    """Return the words of a verb, with some steps."""

    def words(verb, *more, steps=8):
        return ["diffusion", verb, *COMMANDS[verb], "--steps", str(steps), *more]

    return words
