"""Every check finds nothing where all is well, and finds what is wrong."""

import dataclasses
import math
from pathlib import Path

import pytest
import torch

from core_gates.errors import GatesError
from diffusion.evaluation.parity.checks import BOUNDS, GROUPS, run_group
from diffusion.evaluation.parity.files import dialects, factors, reading, round_trips, writer
from diffusion.evaluation.parity.golden import encoder, gates, k_lora, merges, x_lora
from diffusion.evaluation.parity.golden.vectors import check_vectors, read_vectors
from diffusion.evaluation.parity.models import detaching, fused, neutral, published
from diffusion.evaluation.parity.worst import bits_changed, relative_error, worst

VECTORS = Path(__file__).parents[3] / "golden" / "autolora"
QUICK = ("golden vectors", "adapters on a base")


@pytest.mark.parametrize("group", QUICK)
def test_figures_are_within_their_bounds(group):
    found = run_group(group, VECTORS)
    off = {
        name: check
        for name, check in found.items()
        if not abs(check.value - BOUNDS[name].target) <= BOUNDS[name].tolerance
    }
    assert off == {}
    assert all(check.n > 0 for check in found.values())


def test_every_figure_has_a_bound_and_every_check_exists():
    assert len(BOUNDS) == 28
    assert sum(len(checks) for checks in GROUPS.values()) == 15


def test_errors_are_relative_and_what_is_no_number_is_worst():
    one = torch.tensor([1.0, -4.0])
    assert relative_error(one + torch.tensor([0.0, 0.1]), one) == pytest.approx(0.025)
    assert relative_error(one, one[:1]) == math.inf
    assert relative_error(one * math.nan, one) == math.inf
    assert relative_error(one, 0 * one) == math.inf
    assert relative_error(0 * one, 0 * one) == 0
    assert worst([("a", 0.1), ("b", math.nan), ("c", 0.3)])[::2] == (math.inf, "b")
    assert worst([]).value == math.inf


def test_bits():
    one = torch.tensor([0.0, 1.0, float("nan")])
    assert bits_changed(one, one.clone()) == 0
    assert bits_changed(-one, one) == 3  # a sign of zero is a bit, too
    assert bits_changed(one.double(), one) == 3
    assert bits_changed(torch.ones(()), torch.zeros(())) == 1


def test_the_independent_writer_knows_nothing_of_the_reader():
    for module in (dialects, factors, writer):
        source = Path(module.__file__).read_text()
        assert "lora_file" not in source
        assert "core_gates" not in source


@pytest.mark.parametrize("name", ["missing.npz", "damaged.npz", "text.npz"])
def test_vectors_that_cannot_be_read(name, tmp_path, one_line):
    (tmp_path / "damaged.npz").write_bytes((VECTORS / "gate_a.npz").read_bytes()[:900])
    (tmp_path / "text.npz").write_text("vectors")
    assert "give the folder of the golden" in one_line(GatesError, read_vectors, tmp_path, name)


def test_a_folder_without_vectors(tmp_path, one_line):
    message = one_line(GatesError, check_vectors, tmp_path)
    assert "encoder_a.npz" in message
    assert "formats/*.safetensors" in message
    check_vectors(VECTORS)


def broken(monkeypatch, target, change):
    """Replace a function by one whose result is changed."""
    module, _, name = target.rpartition(".")
    from importlib import import_module

    parts = module.split(".")
    for end in range(len(parts), 0, -1):
        try:
            owner = import_module(".".join(parts[:end]))
            break
        except ModuleNotFoundError:
            continue
    for part in parts[end:]:
        owner = getattr(owner, part)
    original = getattr(owner, name)
    monkeypatch.setattr(owner, name, lambda *a, **k: change(original(*a, **k)))


def slightly(tensor):
    return tensor * (1 + 1e-4)


@pytest.mark.parametrize(
    ("target", "check"),
    [
        ("diffusion.retrieval.losses.PublishedLoss.forward", encoder.check_encoder),
        ("core_gates.adapters.lora_gate.LoraGate.gate_values", gates.check_gates),
        ("core_gates.adapters.lora_gate.LoraGate.coefficients", gates.check_gates),
        ("diffusion.rivals.scalings.Scalings.forward", x_lora.check_x_lora),
    ],
)
def test_a_deviation_of_golden_vectors_is_seen(target, check, monkeypatch):
    broken(monkeypatch, target, slightly)
    assert max(found.value for found in check(VECTORS).values()) > 1e-6


def test_a_wrong_choice_and_a_wrong_merge_are_seen(monkeypatch):
    broken(monkeypatch, "diffusion.rivals.k_lora.KLora.choice", lambda name: "1")
    assert k_lora.check_k_lora(VECTORS)["K-LoRA: choices"].value >= 1
    monkeypatch.setattr(merges, "merge", lambda *a, **k: next(iter(a[0].values())))
    assert merges.check_merges(VECTORS)["PEFT: merges"].value > 0.1


def test_a_layer_that_is_lost_is_counted(tmp_path):
    written = writer.write("bfl", "lora_down", "lora_unet_", layers=3)
    bundle = reading.load_lora(written.save(tmp_path / "a.safetensors"))
    assert reading.lost(bundle, written.expected) == 0
    kept = dict(bundle.modules)
    name, own = kept.popitem()
    bundle = dataclasses.replace(bundle, modules=kept)
    assert reading.lost(bundle, written.expected) == 1
    assert reading.delta_error(bundle, written.expected) == math.inf
    kept[name] = own._replace(up=0 * own.up)
    assert reading.lost(bundle, written.expected) == 1
    assert reading.delta_error(bundle, written.expected) == 1


def test_a_round_trip_and_a_refusal():
    error, message = round_trips.round_trip(writer.write("bfl", "loha"), "kohya")
    assert error <= 1e-6
    assert not message
    written = writer.write("diffusers_flux", "dora columns")
    error, message = round_trips.round_trip(written, "diffusers")
    assert error is None
    assert any(module in message for module in written.expected)


def test_gates_that_are_no_sum_are_no_neutral_ones(monkeypatch):
    broken(monkeypatch, "core_gates.adapters.lora_gate.LoraGate.coefficients", lambda c: c * 1.01)
    found = neutral.check_neutral(VECTORS)
    assert found["neutral gates against PEFT's set_adapters"].value > 1e-5
    assert found["one adapter against fuse_lora"].value > 1e-5
    assert fused.check_fused(VECTORS)["groups of split layers against fused ones"].value > 1e-6


def test_what_a_fusion_leaves_behind_is_counted():
    model = detaching.unit_base()
    before = detaching.Before(model, detaching.unit_inputs())
    assert before.changes() == 0
    with torch.no_grad():
        model.proj_out.weight[0, 0] += 1e-3
    assert before.changes() >= 1
    hooked = detaching.unit_base()
    before = detaching.Before(hooked, detaching.unit_inputs())
    handle = hooked.register_forward_hook(lambda *_: None)
    assert before.changes() == 1
    handle.remove()
    state = {"a": torch.zeros(3), "b": torch.ones(2)}
    assert detaching.state_changes({"a": torch.zeros(3), "c": torch.ones(5)}, state) == 7


def test_published_names_and_sizes():
    shapes = dict(published.published_gates())
    assert len(published.published_layers()) == 304
    assert sum(shape[0] for shape in shapes.values()) == 27_316_224
    found = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    assert published.mismatches(found, shapes) == 0
    name = next(iter(found))
    found[f"{name}s"] = found.pop(name)
    assert published.mismatches(found, shapes) == 2
