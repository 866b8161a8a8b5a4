"""The packaged recipes: as large as their table says."""

from pathlib import Path

import torch

from apps.language.seqboat.pieces import module_of
from harness.command.configfile import read_config
from harness.files.piece import flatten
from harness.runs.terminal import quiet_lightning

CONFIGS = Path(__file__).parents[4] / "apps/language/configs"
NORMS = {"layer": lambda d: 2 * d, "scale": lambda d: 1, "batch": lambda d: 2 * d}


def weights(d, layers, z, h, n, norm, table, causal, prenorm):
    """The closed form of the layers: average, gate, unit, carry and norms."""
    average = (1 if causal else 2) * d * n * 4 + d
    gate = 2 * d + 2 + 1
    unit = (d + 1) * (z + 2 * h) + (h + 1) * d + 4 * z + table
    one = average + gate + unit + d * (d + 1) + NORMS[norm](d)
    return layers * one + prenorm * NORMS[norm](d)


RECIPES = {
    "sc10": (
        (60, 8, 30, 120, 16), ("batch", 6 * 128 - 1, False, True), 120 + 61 * 120 + 121 * 10,
    ),
    "lra_listops": ((80, 6, 64, 160, 16), ("layer", 2047, False, False), 16 * 80 + 81 * 10),
    "lra_text": (
        (128, 4, 64, 256, 16), ("scale", 6 * 128 - 1, False, False), 257 * 128 + 129 * 2,
    ),
    "lra_image": ((160, 8, 96, 320, 16), ("batch", 2047, False, True), 2 * 160 + 161 * 10),
    "lra_pathfinder": ((128, 6, 64, 256, 16), ("batch", 2047, False, True), 2 * 128 + 129 * 2),
    "enwik8": ((616, 14, 128, 1232, 16), ("layer", 0, True, True), 257 * 616 + 617 * 257),
}  # fmt: skip


def test_recipes_are_as_large_as_the_table_says():
    quiet_lightning()  # and jsonargparse, which Lightning calls in an old way
    counted = {}
    for name in RECIPES:
        with torch.device("meta"):
            module = module_of(flatten(read_config(CONFIGS / f"{name}.yaml")["model"], "model."))
        counted[name] = sum(p.numel() for p in module.model.parameters())
    assert counted == {
        name: weights(*sizes, *options) + ends for name, (sizes, options, ends) in RECIPES.items()
    }
