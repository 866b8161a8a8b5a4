"""Golden vectors: what published code and PEFT computed, and what this installation computes.

Each comparison takes the folder of the vectors and yields the name and the relative error of
everything that it compares; it raises a ``GatesError`` where a file is missing or damaged.
"""

import json
import math
import zipfile
from collections.abc import Callable, Iterator, Mapping
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from core_gates.adapters import GatedLoraLinear, LoraGate, LowRank
from core_gates.errors import GatesError
from diffusion.lora_file import Factors, FluxShape, LoraBundle, load_lora
from diffusion.retrieval import AdapterBatch, EncoderConfig, LoraWeightEncoder, collate
from diffusion.retrieval.retriever import PublishedLoss
from diffusion.rivals.k_lora import KLora
from diffusion.rivals.merged import merge

ADVICE = "give the folder of the golden vectors, such as tests/golden/autolora"
TOLERANCE = 1e-6  # largest relative error of a comparison
MERGES = (
    *(("same", m) for m in ("cat", "svd", "linear", "ties", "ties_svd", "magnitude_prune")),
    ("mixed", "cat"),
    ("mixed", "svd"),
)  # whether all ranks are the same, and what PEFT merged the adapters by
SAMPLES = (
    "bfl_plain", "diffusers_peft_metadata", "kohya_flux_full", "kohya_sd3", "lycoris_loha",
    "old_attn_processor", "peft_raw_rslora", "xlabs",
)  # fmt: skip
Errors = Iterator[tuple[str, float]]
Vectors = tuple[dict[str, Tensor], dict[str, Any]]  # name -> numbers, what they were computed with


def relative_error(found: Tensor | None, expected: Tensor) -> float:
    """Return the largest deviation over the largest expected magnitude.

    It is infinite where nothing is found, shapes differ or a number is not finite, and where zeros
    are expected but not found.
    """
    if found is None or found.shape != expected.shape or not found.isfinite().all():
        return math.inf
    found, expected = found.detach().double(), expected.double()
    error, scale = (float(t.abs().max()) for t in (found - expected, expected))
    return error / scale if scale else math.inf if error else 0.0


def delta_error(
    bundle: LoraBundle, expected: Mapping[str, Any], base: Mapping[str, Tensor] | None = None
) -> float:
    """Return the largest relative error of the ΔW of all layers; infinite if layers differ.

    Args:
        bundle: What was read.
        expected: Layer -> ΔW.
        base: Layer -> weight of a base, which DoRA refers to.
    """
    if set(bundle.modules) != set(expected):
        return math.inf
    return max(
        relative_error(
            bundle.delta_weight(n, None if base is None else base[n]), torch.as_tensor(delta)
        )
        for n, delta in expected.items()
    )


def read_vectors(folder: str | Path, name: str) -> Vectors:
    """Read a file of golden vectors.

    Args:
        folder: Of the files.
        name: Of the file.

    Raises:
        GatesError: It is missing or damaged.
    """
    path = Path(folder) / name
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            arrays = dict(archive)
            meta = json.loads(str(arrays.pop("meta", "{}")))
            return {k: torch.from_numpy(v) for k, v in arrays.items()}, meta
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise GatesError(
            f"{path} is missing or damaged ({type(error).__name__}): {ADVICE}"
        ) from error


def published_encoder(folder: str | Path) -> tuple[Vectors, LoraWeightEncoder, AdapterBatch]:
    """Return the vectors of ``encoder_a.npz``, the encoder with their weights, and their adapters.

    The adapters are split into the layers of diffusers.
    """
    arrays, meta = vectors = read_vectors(folder, "encoder_a.npz")
    shape = FluxShape(meta["n_double"], meta["n_single"], num_heads=1, head_dim=meta["d"])
    config = EncoderConfig.published(
        shape, dim=meta["embed"], heads=meta["heads"], head_dim=meta["head_dim"],
        hidden_dim=meta["inter"], depth=meta["layers"], probes=meta["probes"],
    )  # fmt: skip
    encoder = LoraWeightEncoder(config).double()
    encoder.load_state_dict({k[2:]: value for k, value in arrays.items() if k.startswith("w.")})
    layers: list[dict[str, Factors]] = [{} for _ in arrays["emb"]]
    for (k, layer), site in product(enumerate(layers), encoder.modules_read):
        down, up = (arrays[f"lora{k}.{site.name}.lora_{x}.weight"] for x in "AB")
        rows = zip(site.parts, up.split(site.sizes), strict=True)
        layer.update({part: Factors(down, block) for part, block in rows})
    bundles = [LoraBundle("flux", layer) for layer in layers]
    return vectors, encoder, collate(bundles, encoder.modules_read, torch.float64)


def encoder_errors(folder: str | Path) -> Errors:
    """Return errors of tokens, vectors, similarities, loss and gradients against published ones."""
    (arrays, _), encoder, batch = published_encoder(folder)
    vectors, text = encoder(batch), arrays["text"]
    loss = PublishedLoss()(text, vectors)
    loss.backward()
    outputs = {"tokens0": encoder.tokens(batch)[0][-1:], "emb": vectors, "loss": loss}
    outputs["sim"] = F.normalize(text) @ F.normalize(vectors).mT
    outputs |= {f"g.{name}": p.grad for name, p in encoder.named_parameters()}
    for name in (key for key in arrays if key.startswith(("tokens0", "emb", "loss", "sim", "g."))):
        yield name, relative_error(outputs[name], arrays[name])


def gate_errors(folder: str | Path) -> Errors:
    """Compare each variant of the gate with its gradients."""
    for file, variant in product(("a", "b"), ("full", "no_base", "no_cross", "no_lora")):
        arrays, _ = read_vectors(folder, f"gate_{file}.npz")
        base, loras = (arrays[name].requires_grad_() for name in ("base", "loras"))
        gate = loaded_gate(arrays, f"{variant}.w", base.shape[-1], variant=variant)
        gate(base, loras.movedim(0, -2)).backward(arrays["cotangent"])
        outputs = {f"g.{name}": p.grad for name, p in gate.named_parameters()}
        outputs |= {
            "out": gate(base, loras.movedim(0, -2)),
            "dbase": base.grad,
            "dloras": loras.grad,
        }
        for key, value in outputs.items():
            yield f"{file} {variant} {key}", relative_error(value, arrays[f"{variant}.{key}"])


def loaded_gate(arrays: Mapping[str, Tensor], prefix: str, dim: int, **options: Any) -> LoraGate:
    """Return a gate with the parameters of vectors."""
    gate = LoraGate(dim, dtype=torch.float64, **options)
    gate.load_state_dict({name: arrays[f"{prefix}.{name}"] for name in gate.state_dict()})
    return gate


def plain_layer(arrays: Mapping[str, Tensor]) -> nn.Linear:
    """Return the frozen layer of vectors."""
    outputs, inputs = arrays["W"].shape
    layer = nn.Linear(inputs, outputs, dtype=torch.float64).requires_grad_(False)
    layer.load_state_dict({"weight": arrays["W"], "bias": arrays["b"]})
    return layer


def layer_errors(folder: str | Path) -> Errors:
    """Compare the plain sum of adapters, the gated layer, and the same without an adapter."""
    arrays, _ = read_vectors(folder, "gated_linear_a.npz")
    layer, scales = plain_layer(arrays), enumerate(arrays["alphas"].tolist())
    adapters = [LowRank(arrays[f"A{k}"], arrays[f"B{k}"], scale) for k, scale in scales]
    gates = [LoraGate(layer.out_features, dtype=torch.float64)]
    gates += [loaded_gate(arrays, "gate", layer.out_features)] * 2
    given = (adapters, adapters, [adapters[0], adapters[-1]])
    for name, own, gate in zip(("naive", "gated", "gated_missing"), given, gates, strict=True):
        fused = GatedLoraLinear(layer, own, gate=gate)(arrays["x"])
        yield name, relative_error(fused, arrays[name])


def choice_errors(folder: str | Path) -> Errors:
    """Yield 1 for each wrong choice of K-LoRA, and the errors of the outputs of choices."""
    arrays, _ = read_vectors(folder, "gated_linear_a.npz")
    model, x, total = nn.Sequential(plain_layer(arrays)), arrays["x"], int(arrays["klora.T"])
    factors = [Factors(arrays[f"A{k}"], arrays[f"B{k}"]) for k in (0, 1)]
    outputs = [model(x) + x @ adapter.down.mT @ adapter.up.mT for adapter in factors]
    adapters = {str(k): LoraBundle("flux", {"0": adapter}) for k, adapter in enumerate(factors)}
    calls, choices = arrays["klora.t"].tolist(), arrays["klora.choice"].tolist()
    with KLora(model, adapters, gamma=1.0) as rival:
        for call, choice in zip(calls, choices, strict=True):
            yield f"choice at {call}", float(rival.choice("0", call, total) != str(choice))
            rival.at(call, total)
            yield f"output at {call}", relative_error(model(x), outputs[choice])
        rival.at(calls[3], total)
        yield "klora.out", relative_error(model(x), arrays["klora.out"])


def merged_adapters(vectors: Vectors, tag: str) -> tuple[dict[str, LoraBundle], dict[str, float]]:
    """Return the adapters of ``peft_weighted_a.npz`` and their weights.

    Args:
        vectors: Of the file.
        tag: ``same`` or ``mixed`` ranks.
    """
    arrays, meta = vectors
    made = {}
    for k, alpha in enumerate(meta["alphas"]):
        downs, ups = ({n: arrays[f"{tag}.{n}.lora_{x}.a{k}.weight"] for n in ("l1", "l2")}
                      for x in "AB")  # fmt: skip
        layers = {n: Factors(down, ups[n], alpha / len(down)) for n, down in downs.items()}
        made[f"a{k}"] = LoraBundle("flux", layers)
    return made, dict(zip(made, meta["weights"], strict=True))


def merge_errors(folder: str | Path) -> Errors:
    """Compare each ΔW of merged adapters, and the outputs of the network with them."""
    arrays, meta = vectors = read_vectors(folder, "peft_weighted_a.npz")
    for tag, method in MERGES:
        made = merge(*merged_adapters(vectors, tag), method, density=meta["density"])
        merged = {f"{layer}.deltaW": made.delta_weight(layer) for layer in ("l1", "l2")}
        first, two = (arrays[f"w.l{k}.weight"] + merged[f"l{k}.deltaW"] for k in (1, 2))
        merged["y"] = F.gelu(arrays["x"] @ first.mT) @ two.mT + arrays["w.l2.bias"]
        for name, value in merged.items():
            yield f"{tag} {method} {name}", relative_error(value, arrays[f"{tag}.{method}.{name}"])


def sample_errors(folder: str | Path) -> Errors:
    """Compare the ΔW of sample files; infinite where a tensor of a file is without effect."""
    for name in SAMPLES:
        expected, _ = read_vectors(folder, f"formats/{name}.expected.npz")
        bundle = load_lora(Path(folder) / "formats" / f"{name}.safetensors")
        used = bundle.report is not None and all(fate.modules for fate in bundle.report.fates)
        yield name, delta_error(bundle, expected) if used else math.inf


COMPARISONS: Mapping[str, Callable[[str | Path], Errors]] = {
    "encoder and loss": encoder_errors,
    "gate in four variants": gate_errors,
    "gated layer": layer_errors,
    "choices of K-LoRA": choice_errors,
    "merges of PEFT": merge_errors,
    "ΔW of sample files": sample_errors,
}  # each is within the tolerance
