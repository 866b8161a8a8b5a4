"""Cosines of ΔW, against explicit ΔW in float64."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from diffusion.library import LibraryError, LoraLibrary
from diffusion.lora_file import load_lora, save_lora


def changes(path):
    """ΔW by layer, for DoRA that of the direction."""
    bundle = load_lora(path)
    pairs = {name: bundle.modules[name].low_rank() for name in bundle.modules}
    return {n: (p.scale * p.up.double() @ p.down.double()).numpy() for n, p in pairs.items()}


def cosine(one, two):
    """The cosine of explicit ΔW over the union of their layers."""
    dot = sum(float((one[n] * two[n]).sum()) for n in one if n in two)
    norms = [np.sqrt(sum(float((d**2).sum()) for d in change.values())) for change in (one, two)]
    return dot / norms[0] / norms[1]


@pytest.fixture
def filled(library, root, put):
    """Ranks 1 to 3 mixed, other dialects, some layers only, LoHa, LoKr and DoRA."""
    kinds = {
        "bfl": ("bfl", "lora_down", None),
        "half": ("bfl", "lora_down", 9),
        "loha": ("bfl", "loha", 9),
        "lokr": ("bfl", "lokr wf", 12),
        "dora": ("bfl", "dora rows", 9),
        "diffusers": ("diffusers_flux", "lora_A", None),
        "xlabs": ("xlabs", "_lora", None),
    }
    for seed, (name, (names, kind, layers)) in enumerate(kinds.items()):
        prefix = "" if names == "xlabs" else "lora_unet_" if names == "bfl" else "transformer."
        path = root / f"{name}.safetensors"
        put(path, seed, names=names, kind=kind, prefix=prefix, layers=layers)
    sd3 = {"names": "native_sd3", "prefix": "lora_unet_"}
    put(root / "sd3.safetensors", 1, **sd3)
    put(root / "sd3 too.safetensors", 2, **sd3)
    library.scan()
    return library


def test_cosines(filled, root):
    flux = filled.adapters(family="flux")
    assert len(flux) == 7
    explicit = {a.name: changes(root / a.path) for a in flux}
    for one in flux:
        own = explicit[one.name]
        expected = {name: cosine(own, d) for name, d in explicit.items() if name != one.name}
        found = filled.like(one.name, 9)
        assert (found.mode, found.notice) == ("similarity", "")
        assert {n.adapter.name: n.cosine for n in found} == pytest.approx(expected, abs=1e-9)
        cosines = [n.cosine for n in found]
        assert cosines == sorted(cosines, reverse=True)
        assert [n.adapter.name for n in filled.like(one.name, 2)] == [
            n.adapter.name for n in found[:2]
        ]
        assert not any(n.near_duplicate for n in found)
    (only,) = filled.like("sd3")
    assert only.adapter.name == "sd3-too"


def test_near_duplicates(filled, root, tmp_path):
    bundle = load_lora(root / "half.safetensors")
    save_lora(bundle, root / "same.safetensors", "diffusers")
    half = load_file(root / "half.safetensors")
    rng = torch.Generator().manual_seed(0)
    for name, noise, sign in (("near", 0.05, 1), ("far", 0.5, 1), ("not", 0, -1)):
        tensors = {
            k: sign * (t + noise * torch.randn(t.shape, generator=rng)) if "lora_up" in k else t
            for k, t in half.items()
        }
        save_file(tensors, root / f"{name}.safetensors")
    filled.scan()
    found = filled.like("half", 99)
    assert [n.adapter.name for n in found[:3]] == ["same", "near", "far"]
    assert [n.near_duplicate for n in found] == [True, True] + [False] * (len(found) - 2)
    assert found[0].cosine == pytest.approx(1)
    assert 0.99 < found[1].cosine < 1
    pair = (changes(root / f"{name}.safetensors") for name in ("half", "far"))
    assert found[2].cosine == pytest.approx(cosine(*pair))
    assert (found[-1].adapter.name, found[-1].cosine) == ("not", pytest.approx(-1))
    outside = tmp_path / "other.safetensors"
    save_lora(bundle, outside, "comfyui")
    assert [n.adapter.name for n in filled.like(outside, 3)] == ["half", "same", "near"]


def test_files_that_the_bound_excludes_are_not_read(library, root, put, monkeypatch):
    rng = torch.Generator().manual_seed(0)

    def write(name, *layers):
        tensors = {}
        for layer in layers:
            key = f"transformer.transformer_blocks.{layer}.attn.to_q"
            tensors[f"{key}.lora_A.weight"] = torch.randn(2, 16, generator=rng)
            tensors[f"{key}.lora_B.weight"] = torch.randn(16, 2, generator=rng)
        save_file(tensors, root / f"{name}.safetensors")

    write("one", 0)
    for number in range(5):
        write(f"other {number}", 1)
    read = []
    library.scan()
    tensors = load_file(root / "one.safetensors")
    save_file({k: 2 * t for k, t in tensors.items()}, root / "two.safetensors")
    library.scan()
    original = LoraLibrary._read
    monkeypatch.setattr(
        LoraLibrary, "_read", lambda self, one: read.append(one.location) or original(self, one)
    )
    (found,) = library.like("one", 1)
    assert (found.adapter.name, found.cosine) == ("two", pytest.approx(1))
    assert read == [b"two.safetensors"]
    zero = library.like("one", 4)
    assert [n.cosine for n in zero[1:]] == [0, 0, 0]
    assert [n.adapter.name for n in zero[1:]] == [f"other-{n}" for n in range(3)]


def test_models_of_another_size_and_changed_files_are_told(library, root, put, one_line):
    put(root / "a.safetensors", 1)
    put(root / "b.safetensors", 2)
    put(root / "c.safetensors", 3)
    wide = {
        "transformer.transformer_blocks.0.attn.to_q.lora_A.weight": torch.ones(1, 24),
        "transformer.transformer_blocks.0.attn.to_q.lora_B.weight": torch.ones(24, 1),
    }
    save_file(wide, root / "wide.safetensors")
    small = {k: t[:, :16] if "lora_A" in k else t[:16] for k, t in wide.items()}
    save_file(small, root / "small.safetensors")
    library.scan()
    put(root / "c.safetensors", 4)
    found = library.like("small", 9)
    assert {n.adapter.name for n in found} == {"a", "b"}
    assert found.notice == (
        "1 of 4 adapters are for models of another size; 1 have changed or gone since the last scan"
    )
    assert "no adapter 'none'" in one_line(LibraryError, library.like, "none")
    assert "k is 0" in one_line(LibraryError, library.like, "a", 0)
    save_file({k: 0 * t for k, t in small.items()}, root / "zero.safetensors")
    assert "norm 0" in one_line(LibraryError, library.like, root / "zero.safetensors")
