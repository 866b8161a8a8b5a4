"""The product of prefixes, names of layers and factors, written by an independent writer."""

import itertools
import re
from pathlib import Path

import pytest
import torch

from diffusion.lora_file import load_lora

DIALECTS = (
    "bfl", "diffsynth", "diffusers_flux", "native_sd3", "diffusers_sd3", "xlabs",
    "processors_flux", "processors_sd3",
)  # fmt: skip


@pytest.fixture
def read(dialects, tmp_path):
    """Save a file and load it for a base with the layers of every dialect of its family."""

    numbers = itertools.count()

    def load(written, **options):
        base = options.pop("base", dialects.base_of(written.family))
        bundle = load_lora(written.save(tmp_path / f"{next(numbers)}.safetensors"), base, **options)
        assert [fate.key for fate in bundle.report.fates if not fate.modules] == []
        return bundle

    return load


def test_the_writer_knows_nothing_of_the_reader(dialects):
    source = Path(dialects.__file__).read_text()
    assert re.findall(r"^ *(?:from|import) (?:diffusion|core_gates)", source, re.MULTILINE) == []


@pytest.mark.parametrize("names", DIALECTS)
def test_every_prefix_and_kind_of_factors(names, dialects, read, relative_error):
    combinations = [combination for combination in dialects.product() if combination[0] == names]
    assert len(combinations) >= (8 if "_lora" in dialects.kinds_of(names) else 150)
    errors, silent = {}, []
    for combination in combinations:
        written = dialects.write(*combination, layers=4)
        bundle = read(written)
        errors[combination] = relative_error(bundle, written.expected, written.base)
        silent += [n for n in written.expected if not bundle.modules[n].norm() > 0]
    assert ({c: e for c, e in errors.items() if not e <= 1e-5}, silent) == ({}, [])


@pytest.mark.parametrize(
    ("names", "underscored"),
    [(names, underscored) for names in DIALECTS[:5] for underscored in (False, True)]
    + [("xlabs", False)],
)
def test_every_layer_without_a_base(names, underscored, dialects, read, relative_error):
    kind = dialects.kinds_of(names)[0]
    for prefix in dialects.PREFIXES[underscored]:
        written = dialects.write(names, kind, prefix)
        bundle = read(written, base=written.family)
        assert relative_error(bundle, written.expected) <= 1e-5
        assert bundle.family == written.family
        assert all(dialect.prefix == prefix for dialect in bundle.report.dialects)
        assert bundle.report.dialects[0].underscored is underscored


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2]
)
@pytest.mark.parametrize("kind", ["lora_down", "loha", "lokr ff", "lokr ww", "dora rows", "tucker"])
def test_stored_precision(kind, dtype, dialects, read, relative_error):
    written = dialects.write("bfl", kind, "lora_unet_", dtype=dtype)
    assert {t.dtype for n, t in written.tensors.items() if "lora" in n.split(".")[-1]} <= {dtype}
    bundle = read(written)
    assert relative_error(bundle, written.expected, written.base) <= 1e-5
    assert bundle.storage == dtype


@pytest.mark.parametrize("kind", ["lora_down", "loha", "lokr wf", "lokr ww"])
def test_missing_alpha_is_the_rank(kind, dialects, read, relative_error):
    written = dialects.write("bfl", kind, "lora_unet_", alpha=False)
    bundle = read(written)
    assert relative_error(bundle, written.expected) <= 1e-5
    assert "α = r is assumed" in bundle.report.notes[0]


def test_a_mixture_of_dialects(dialects, relative_error, tmp_path):
    one = dialects.write("bfl", "loha", "lora_unet_", layers=3, seed=1)
    two = dialects.write("diffusers_flux", "lora_A", "transformer.", seed=2)
    taken = tuple(f"transformer.{part}.{end}" for part in one.expected for end in ("lora", "alpha"))
    rest = {name: t for name, t in two.tensors.items() if not name.startswith(taken)}
    mixed = one._replace(
        tensors=one.tensors | rest,
        expected=two.expected | one.expected,
    )
    bundle = load_lora(mixed.save(tmp_path / "a.safetensors"), "flux")
    assert relative_error(bundle, mixed.expected) <= 1e-5
    assert {dialect.names for dialect in bundle.report.dialects} == {"bfl", "diffusers"}
