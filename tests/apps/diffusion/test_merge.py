"""What ``gates diffusion merge`` writes, compared with sums of the changes of its files."""

import json

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from diffusion.lora_file import load_lora

NAMES = ("kohya_flux_full", "xlabs", "bfl_plain")
TEXT = "text_model.encoder.layers.0.self_attn.q_proj"
Q, K = (f"transformer.transformer_blocks.0.attn.to_{c}" for c in "qk")


@pytest.fixture
def merge(gates, samples):
    def run(*words, files=NAMES, output="out.safetensors"):
        paths = [samples / f"{name}.safetensors" for name in files]
        return gates("merge", *paths, "--output", output, *words)

    return run


def combined(expected, weights):
    """The weighted sum of ΔW, layer by layer."""
    total = {}
    for name, weight in weights.items():
        for layer, delta in expected(name).items():
            total[layer] = total.get(layer, 0) + weight * delta
    return total


@pytest.mark.parametrize(
    ("words", "weights"),
    [
        (["--method", "sum"], (1, 1, 1)),
        (["--method", "mean"], (1 / 3, 1 / 3, 1 / 3)),
        (["--method", "weighted", "--weights", "xlabs:0.5,bfl_plain:-2"], (1, 0.5, -2)),
        (["--method", "cat", "--weights", "0.25, 2 ,0"], (0.25, 2, 0)),
    ],
    ids=["sum", "mean", "weighted", "cat"],
)
@pytest.mark.parametrize("format", ["diffusers", "kohya", "peft"])
def test_exact_methods(words, weights, format, merge, expected, worst):
    output = "out" if format == "peft" else "out.safetensors"
    assert merge(*words, "--to", format, output=output).splitlines()[-1] == output
    total = combined(expected, dict(zip(NAMES, weights, strict=True)))
    assert worst(load_lora(output), total) <= 1e-5


def test_svd_is_the_best_approximation_of_the_largest_rank_or_another(merge, expected):
    total = combined(expected, dict.fromkeys(NAMES, 1))["transformer_blocks.0.attn.to_out.0"]
    for words, rank in (((), 4), (("--rank", 2), 2)):
        merge("--method", "svd", *words, "--to", "diffusers", "--overwrite_output")
        bundle = load_lora("out.safetensors")
        assert max(bundle.ranks().values()) == rank
        found = bundle.delta_weight("transformer_blocks.0.attn.to_out.0").double().numpy()
        best = np.sqrt((np.linalg.svd(total, compute_uv=False)[rank:] ** 2).sum())
        assert np.linalg.norm(found - total) == pytest.approx(best, rel=1e-4)


def test_sparse_methods_are_those_of_the_rivals(merge, samples):
    from diffusion.rivals.merged import merge as reference

    files = ("xlabs", "kohya_flux_full")
    adapters = {name: load_lora(samples / f"{name}.safetensors") for name in files}
    words = ("--density", 0.3, "--rank", 3, "--weights", "1,2", "--to", "diffusers")
    merge("--method", "ties_svd", *words, files=files)
    found = load_lora("out.safetensors")
    wanted = reference(
        adapters, dict(zip(files, (1, 2), strict=True)), "ties_svd", density=0.3, rank=3
    )
    assert set(found.modules) == set(wanted.modules)
    for name in wanted.modules:
        torch.testing.assert_close(found.delta_weight(name), wanted.delta_weight(name))
    plain = reference(adapters, dict(zip(files, (1, 2), strict=True)), "cat")
    one = "transformer_blocks.0.attn.to_out.0"
    assert not torch.allclose(found.delta_weight(one), plain.delta_weight(one), rtol=1e-2)


def test_what_dare_drops_follows_the_seed(merge):
    files = ("xlabs", "kohya_flux_full")
    for seed, output in ((0, "a"), (0, "b"), (1, "c")):
        merge(
            "--method",
            "dare_linear_svd",
            "--seed",
            seed,
            "--to",
            "diffusers",
            files=files,
            output=f"{output}.safetensors",
        )
    a, b, c = (load_lora(f"{name}.safetensors").digest() for name in "abc")
    with safe_open("c.safetensors", "pt") as file:
        assert json.loads(file.metadata()["gates.merge"])["seed"] == 1
    assert a == b != c


def test_the_header_says_where_it_comes_from(merge, samples):
    tensors = {f"{Q}.lora_A.weight": torch.ones(1, 16), f"{Q}.lora_B.weight": torch.ones(16, 1)}
    told = {"modelspec.license": "CC0-1.0", "modelspec.trigger_phrase": "sks"}
    save_file(tensors, samples / "one.safetensors", told | {"modelspec.title": "One"})
    save_file(tensors, samples / "two.safetensors", told | {"modelspec.license": "MIT"})
    merge("--weights", "one:0.5", "--method", "weighted", files=("one", "two", "kohya_flux_full"))
    with safe_open("out.safetensors", "pt") as file:
        metadata = file.metadata()
    assert metadata["modelspec.title"] == "One + two + demo_style"
    assert metadata["modelspec.trigger_phrase"] == "sks, demo style"
    assert metadata["modelspec.license"] == "CC0-1.0; MIT"
    assert json.loads(metadata["gates.merge"]) == {
        "method": "weighted",
        "strengths": {"one": 0.5, "two": 1.0, "kohya_flux_full": 1.0},
    }


def with_text(path, seed, encoder="text_encoder"):
    generator = torch.Generator().manual_seed(seed)
    sizes = {Q: 16, f"{encoder}.{TEXT}": 8}
    tensors = {}
    for layer, size in sizes.items():
        tensors[f"{layer}.lora_A.weight"] = torch.randn(2, size, generator=generator)
        tensors[f"{layer}.lora_B.weight"] = torch.randn(size, 2, generator=generator)
    save_file(tensors, path)


def test_parts_for_text_encoders(merge, gates, samples, capsys):
    for seed, name in enumerate("ab"):
        with_text(samples / f"{name}.safetensors", seed)
    merge("--method", "weighted", "--weights", "a:2", files="ab")
    a, b, out = (
        load_lora(path).text_encoders["text_encoder"][TEXT].delta_weight()
        for path in (samples / "a.safetensors", samples / "b.safetensors", "out.safetensors")
    )
    torch.testing.assert_close(out, 2 * a + b)
    printed = merge("--method", "ties", "--lenient", "--overwrite_output", files="ab")
    assert "left out: 1 layers of text_encoder in 'a': ties cannot merge them" in printed
    assert load_lora("out.safetensors").text_encoders == {}


def test_files_of_one_stem_get_names(gates, samples, expected, worst):
    (samples / "other").mkdir()
    other = samples / "other" / "xlabs.safetensors"
    other.write_bytes((samples / "bfl_plain.safetensors").read_bytes())
    gates(
        "merge", samples / "xlabs.safetensors", f"second={other}",
        "--output", "out.safetensors", "--method", "weighted", "--weights", "xlabs:0.5,second:3",
        "--to", "diffusers",
    )  # fmt: skip
    total = combined(expected, {"xlabs": 0.5, "bfl_plain": 3})
    assert worst(load_lora("out.safetensors"), total) <= 1e-5


def test_norms_of_each_file_and_of_the_result(merge, expected):
    printed = merge("--method", "mean")
    (row,) = [line for line in printed.splitlines() if "│ single_transformer_blocks.0" in line]
    cells = [cell.strip() for cell in row.strip("│").split("│")]
    total = combined(expected, dict.fromkeys(NAMES, 1 / 3))
    norms = []
    for deltas, weight in (*((expected(name), 1 / 3) for name in NAMES), (total, 1)):
        own = [d for n, d in deltas.items() if n.startswith("single_transformer_blocks.0.")]
        norms.append(weight * np.sqrt(sum(np.linalg.norm(delta) ** 2 for delta in own)))
    assert [float(cell) for cell in cells[1:]] == pytest.approx(norms, rel=1e-3)
