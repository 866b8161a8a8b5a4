"""Neutral gates as PEFT adds adapters, one adapter as diffusers fuses it, and any order of them."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from copy import deepcopy
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from torch import Tensor

from diffusion.evaluation.parity.files.exports import pipeline_around, quiet_libraries
from diffusion.evaluation.parity.models.subjects import (
    Inputs,
    predicted,
    three_adapters,
    unit_base,
    unit_inputs,
    with_drawn_gates,
)
from diffusion.evaluation.parity.worst import Check, relative_error, worst
from diffusion.fusion import GatedFusion
from diffusion.lora_file import LoraBundle, save_lora

STRENGTHS = {"a": 0.7, "b": 1.0, "c": -0.4}


def by_peft(
    model: Any, adapters: Mapping[str, LoraBundle], strengths: Mapping[str, float], inputs: Inputs
) -> Tensor:
    """Return what the model predicts with all adapters active by ``set_adapters``."""
    with quiet_libraries(), TemporaryDirectory() as folder:
        pipe = _loaded(model, adapters, Path(folder))
        pipe.set_adapters(list(strengths), list(strengths.values()))
    return predicted(pipe.transformer, inputs)


def fused_by_diffusers(model: Any, bundle: LoraBundle, scale: float, inputs: Inputs) -> Tensor:
    """Return what the model predicts with one adapter in its weights by ``fuse_lora``."""
    with quiet_libraries(), TemporaryDirectory() as folder:
        pipe = _loaded(model, {"one": bundle}, Path(folder))
        pipe.fuse_lora(components=["transformer"], lora_scale=scale)
        pipe.unload_lora_weights()
    return predicted(pipe.transformer, inputs)


def _loaded(model: Any, adapters: Mapping[str, LoraBundle], folder: Path) -> Any:
    pipe = pipeline_around(deepcopy(model), "flux")
    for name, bundle in adapters.items():
        path = save_lora(bundle, folder / f"{name}.safetensors")
        pipe.load_lora_weights(
            str(folder), weight_name=path.name, adapter_name=name, use_safetensors=True
        )
    return pipe


def neutral_errors() -> Iterator[tuple[str, float]]:
    """Yield the errors of untrained gates with strengths, and of plain sums."""
    model, inputs = unit_base(), unit_inputs()
    adapters = three_adapters(model)
    for given in (dict.fromkeys(adapters, 1.0), STRENGTHS):
        expected = by_peft(model, adapters, given, inputs)
        for mode in ("gated", "sum"):
            with GatedFusion(model, adapters, mode=mode) as fusion:  # type: ignore[arg-type]
                fusion.set_strengths(given)
                found = predicted(model, inputs)
            yield f"{mode} {list(given.values())}", relative_error(found, expected)
            yield f"{mode} changes the base", _seen(found, predicted(model, inputs))


def single_errors() -> Iterator[tuple[str, float]]:
    """Yield the errors of each adapter alone."""
    model, inputs = unit_base(), unit_inputs()
    for name, bundle in three_adapters(model).items():
        expected = fused_by_diffusers(model, bundle, STRENGTHS[name], inputs)
        with GatedFusion(model, {name: bundle}) as fusion:
            fusion.set_strengths({name: STRENGTHS[name]})
            yield name, relative_error(predicted(model, inputs), expected)
        yield f"{name} changes the base", _seen(expected, predicted(model, inputs))


def order_errors() -> Iterator[tuple[str, float]]:
    """Yield the errors of all orders of three adapters under gates that are far from a sum."""
    model, inputs = unit_base(), unit_inputs()
    adapters = three_adapters(model)
    fusion = with_drawn_gates(GatedFusion(model, adapters))
    with fusion:
        expected = predicted(model, inputs)
    with GatedFusion(model, adapters):
        yield "gates are no sum", _seen(expected, predicted(model, inputs))
    for order in itertools.permutations(adapters):
        fusion.set_adapters({name: adapters[name] for name in order})
        with fusion:
            yield " ".join(order), relative_error(predicted(model, inputs), expected)


def _seen(found: Tensor, plain: Tensor) -> float:
    """Return 0 where an effect is plain to see, else infinity."""
    return 0.0 if relative_error(found, plain) > 1e-2 else float("inf")


def check_neutral(folder: str | Path) -> dict[str, Check]:
    """Compare with PEFT and diffusers, and permute adapters."""
    del folder
    return {
        "permuted adapters": worst(order_errors()),
        "neutral gates against PEFT's set_adapters": worst(neutral_errors()),
        "one adapter against fuse_lora": worst(single_errors()),
    }
