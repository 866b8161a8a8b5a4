"""What diffusers does with a dialect, against what it did when every dialect was loaded."""

import json
from pathlib import Path

import pytest

from diffusion.lora_file import load_lora, verdicts

GOLDEN = Path(__file__).parents[2] / "golden" / "autolora" / "diffusers_effects.json"
MEASURED = [
    (names, kind, prefix, alpha == "alpha", effect)
    for names, prefixes in json.loads(GOLDEN.read_text()).items()
    for prefix, alphas in prefixes.items()
    for alpha, effects in alphas.items()
    for effect, kinds in effects.items()
    for kind in kinds
]
"""Effects measured in diffusers 0.42.1 on models of width 16."""


def test_all_dialects_were_measured(dialects):
    measured = {measurement[:3] for measurement in MEASURED}
    assert len(MEASURED) == 2072
    assert {c for c in dialects.product() if c[1] != "convolution"} == measured
    assert {measurement[-1] for measurement in MEASURED} == {"whole", "part", "nothing", "error"}


@pytest.mark.parametrize("part", range(4))
def test_effects(part, dialects, tmp_path):
    chosen = ([m for m in MEASURED if m[-1] in ("whole", "part")] + MEASURED[::11])[part::4]
    wrong = []
    for number, (names, kind, prefix, alpha, effect) in enumerate(chosen):
        written = dialects.write(names, kind, prefix, alpha=alpha)
        bundle = load_lora(written.save(tmp_path / f"{number}.safetensors"), written.family)
        (verdict,) = verdicts(bundle.report)
        assert (verdict.loader, verdict.tensors) == ("diffusers 0.42.1", len(written.tensors))
        assert bool(verdict.what) == (verdict.effect != "whole")
        if verdict.effect != effect:
            wrong.append((names, kind, prefix, alpha, effect, verdict))
    assert wrong == []


def test_layers_within_the_blocks_are_read_whole(dialects, tmp_path):
    written = dialects.write("bfl", "lora_down", "lora_unet_")
    for words, effect in (("blocks", "whole"), ("", "part")):
        tensors = {key: tensor for key, tensor in written.tensors.items() if words in key}
        path = written._replace(tensors=tensors).save(tmp_path / f"{effect}.safetensors")
        assert [verdict.effect for verdict in verdicts(load_lora(path).report)] == [effect]


def test_each_prefix_has_its_verdict(dialects, tmp_path):
    one = dialects.write("bfl", "loha", "lora_unet_", layers=2, seed=1)
    two = dialects.write("diffusers_flux", "lora_A", "transformer.")
    taken = tuple(f"transformer.{part}.{end}" for part in one.expected for end in ("lora", "alpha"))
    rest = {name: tensor for name, tensor in two.tensors.items() if not name.startswith(taken)}
    path = one._replace(tensors=one.tensors | rest).save(tmp_path / "a.safetensors")
    found = verdicts(load_lora(path).report)
    assert [verdict.tensors for verdict in found] == [len(rest), len(one.tensors)]
    assert found[1].effect == "nothing"
