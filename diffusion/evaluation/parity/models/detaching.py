"""A base after its adapters are gone, and saved while they are there: the same bits."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from copy import deepcopy
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from torch import Tensor, nn

from core_gates.errors import GatesError
from diffusion.evaluation.parity.files.exports import quiet_libraries
from diffusion.evaluation.parity.models.subjects import (
    Inputs,
    predicted,
    three_adapters,
    unit_base,
    unit_inputs,
    with_drawn_gates,
)
from diffusion.evaluation.parity.worst import Check, bits_changed
from diffusion.fusion import GatedFusion
from diffusion.rivals.registry import make_rival

RIVALS = ("switch", "composite", "k_lora", "svd")
"""Other ways to use adapters that must leave a base as it was."""


class Before:
    """What a base was.

    Args:
        model: The base.
        inputs: Of it.
    """

    def __init__(self, model: nn.Module, inputs: Inputs) -> None:
        self.model, self.inputs = model, inputs
        self.state = {name: t.clone() for name, t in model.state_dict().items()}
        self.layers = dict(model.named_modules())
        self.output = predicted(model, inputs)

    def changes(self) -> int:
        """Return how many numbers, layers and hooks are no longer what they were."""
        state, layers = self.model.state_dict(), dict(self.model.named_modules())
        count = sum(layers.get(name) is not layer for name, layer in self.layers.items())
        count += len(layers.keys() ^ self.layers.keys())
        count += sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in layers.values())
        count += bits_changed(predicted(self.model, self.inputs), self.output)
        return count + state_changes(state, self.state)


def state_changes(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> int:
    """Return how many numbers of a state dict differ in a bit, are missing or too many."""
    lacking = sum(expected[n].numel() for n in expected.keys() - found.keys())
    more = sum(found[n].numel() for n in found.keys() - expected.keys())
    both = found.keys() & expected.keys()
    return lacking + more + sum(bits_changed(found[name], expected[name]) for name in both)


def fusions(model: nn.Module) -> dict[str, Any]:
    """Return fusions of all kinds that are not attached."""
    adapters = three_adapters(model)
    made: dict[str, Any] = {
        "gated": with_drawn_gates(GatedFusion(model, adapters)),
        "film": with_drawn_gates(GatedFusion(model, adapters, time="film")),
        "sum": GatedFusion(model, adapters, mode="sum"),
    }
    pair = {name: adapters[name] for name in ("a", "b")}
    return made | {name: make_rival(name, model, pair) for name in RIVALS}


def changes_after(before: Before, fusion: Any) -> int:
    """Return what a fusion leaves changed after use, after an error inside, and after nesting.

    A fusion that changes nothing while attached, or lets another in, counts as a change.
    """
    model, inputs = before.model, before.inputs
    count = 0
    with fusion:
        count += not bits_changed(predicted(model, inputs), before.output)
        count += _allowed(fusion.attach)
        count += _allowed(lambda: GatedFusion(model, three_adapters(model)))
        count += not fusion.attached
    count += before.changes()
    try:
        with fusion:
            predicted(model, inputs)
            raise InterruptedError
    except InterruptedError:
        pass
    return count + before.changes()


def _allowed(call: Callable[[], object]) -> int:
    try:
        call()
    except GatesError:
        return 0
    return 1


def saved_changes(model: Any, fusion: Any) -> int:
    """Return how many numbers of a file differ from the base that it was saved from."""
    expected = {name: t.clone() for name, t in model.state_dict().items()}
    with TemporaryDirectory() as folder, quiet_libraries():
        with fusion:
            model.save_pretrained(folder)
        again = type(model).from_pretrained(folder, local_files_only=True)
    return state_changes(again.state_dict(), expected)


def check_detaching(folder: str | Path) -> dict[str, Check]:
    """Count changed bits after detaching, and in files saved while adapters are attached."""
    del folder
    model, inputs = unit_base(), unit_inputs()
    every = fusions(model)
    before = Before(model, inputs)
    left = {name: changes_after(before, fusion) for name, fusion in every.items()}
    other = deepcopy(model)
    saved = {name: saved_changes(other, fusions(other)[name]) for name in ("gated", "film", "sum")}
    return {
        "bits changed after detach": _total(left),
        "bits changed in a file saved while attached": _total(saved),
    }


def _total(counts: Mapping[str, int]) -> Check:
    return Check(float(sum(counts.values())), len(counts), max(counts, key=lambda n: counts[n]))
