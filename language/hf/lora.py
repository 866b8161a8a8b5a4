"""SoRA on the linear layers of a model of transformers: attached, kept in a file, made a LoRA."""

import json
import warnings
from collections.abc import Collection, Mapping, Sequence
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor, nn

from core_gates.adapters.attachment import attach_adapters
from core_gates.adapters.sparse_low_rank import (
    GateInitialization,
    SparseLoraLinear,
    SparseLowRank,
    sizes_of,
)
from core_gates.errors import GatesError, check_whole
from harness.files import refuse_strangers, replacing, write_json
from language.hf.gate_file import (
    other_tokens,
    read_known,
    token_digests,
    weights_digest,
    write_known,
)
from language.hf.locate import base_of

KIND = "sora"
BLOCKS = ("*.[0-9]*.*",)
"""Pattern of the names of layers inside the numbered blocks of a model."""

FILE = "sora.safetensors"
CONFIG, WEIGHTS, LABELS = "adapter_config.json", "adapter_model.safetensors", "labels.json"
PREFIX = "base_model.model."
"""What PEFT writes before the names of a model."""

TASKS = {"ForSequenceClassification": "SEQ_CLS", "ForCausalLM": "CAUSAL_LM", "LMHead": "CAUSAL_LM"}
"""Parts of the names of classes, and the task that PEFT calls them by."""


def attach_sora(
    model: nn.Module,
    *,
    rank: int = 8,
    alpha: float = 16.0,
    where: Sequence[str] = BLOCKS,
    initialization: GateInitialization = "normal",
) -> dict[str, SparseLoraLinear]:
    """Freeze a model of transformers and put a SoRA next to its linear layers, in place.

    ``save_pretrained`` writes ``sora.safetensors`` next to its weights from then on. Trained are
    the adapters and the heads, see `heads_of`; all else is frozen. Train with
    `core_gates.training.ThresholdSchedule`, which makes gates exactly zero.

    Args:
        model: An encoder or a decoder of transformers, with or without a head.
        rank: Largest rank R of a layer.
        alpha: Numerator α of the scale α/R.
        where: Patterns of the names of layers, ``nn.Linear`` or ``Conv1D`` of GPT-2; by default
            all of the numbered blocks. Heads are not among them, as they are trained whole.
        initialization: ``normal`` as published, ``ones`` for a start as a plain LoRA.

    Returns:
        Name of each layer -> its replacement, with the ``adapter``.

    Raises:
        MissingExtraError: transformers is not installed.
        ValueError: The rank is no whole number from 1 on, or alpha not a positive number.
        GatesError: The model is not one of transformers or has adapters already, no layer matches,
            or a layer shares its weight with the token embedding.
    """
    _refuse_adapted(model)
    check_whole(1, rank=rank)
    heads = tuple(f"{head}." for head in heads_of(model))
    layers = {
        name: layer
        for name, layer in model.named_modules()
        if isinstance(layer, _kinds()) and not f"{name}.".startswith(heads)
    }
    where = [where] if isinstance(where, str) else where  # its letters are no patterns
    chosen = [name for name in layers if any(fnmatchcase(name, pattern) for pattern in where)]
    if not chosen:
        raise GatesError(
            f"no linear layer of {type(model).__name__} matches {list(where)}: it has"
            f" {', '.join(list(layers)[:8]) or 'none'}"
        )
    _attach(model, chosen, rank=rank, alpha=alpha, initialization=initialization)
    return sora_layers(model)


def sora_layers(model: nn.Module) -> dict[str, SparseLoraLinear]:
    """Return the layers of a model that have a SoRA, by name."""
    return {n: m for n, m in model.named_modules() if isinstance(m, SparseLoraLinear)}


def heads_of(model: nn.Module) -> list[str]:
    """Return the names of the modules that are new to a task, and are therefore trained whole.

    They are what a model has besides its base, and the pooler of the base. A model that predicts
    tokens, or the base alone, has none.

    Raises:
        GatesError: It is not a model of transformers.
    """
    base: Any = base_of(model)
    if base is model or model.get_output_embeddings() is not None:  # type: ignore[operator]
        return []
    heads = {name: child for name, child in model.named_children() if child is not base}
    if isinstance(pooler := getattr(base, "pooler", None), nn.Module):
        heads[f"{model.base_model_prefix}.pooler"] = pooler
    return [name for name, child in heads.items() if any(True for _ in child.parameters())]


def base_digest(model: nn.Module) -> str:
    """Return a digest of the base model of adapters, 16 hexadecimal digits.

    It is `language.hf.gate_file.weights_digest` without heads, so that they, adapters and the
    token embedding do not matter; the last has `language.hf.gate_file.token_digests`.

    Raises:
        GatesError: It is not a model of transformers.
    """
    poolers = [head.partition(".")[2] for head in heads_of(model) if "." in head]
    return weights_digest(model, poolers)


def save_sora(model: nn.Module, path: str | Path) -> Path:
    """Write the adapters of a model, with their gates, and its heads.

    Args:
        model: With adapters, see `attach_sora`, or with heads alone.
        path: A ``.safetensors`` file. Its metadata hold a fingerprint of the base, see
            `base_digest`.

    Returns:
        The path.

    Raises:
        GatesError: There is nothing to write, or the file cannot be written.
    """
    model = getattr(model, "_orig_mod", model)  # torch.compile
    heads, layers = heads_of(model), list(sora_layers(model))
    _refuse_bare(model, [*heads, *layers])
    kept = (*(f"{name}.adapter." for name in layers), *(f"{head}." for head in heads))
    tensors = {name: t for name, t in model.state_dict().items() if name.startswith(kept)}
    return write_known(path, _facts(model), {"layers": layers}, tensors)


def load_sora(model: nn.Module, path: str | Path) -> dict[str, SparseLoraLinear]:
    """Read adapters and heads into a model, which is frozen but for these.

    Args:
        model: The base that they were trained on, with heads of the same sizes; with adapters on
            the same layers, of any rank, or without.
        path: What `save_sora` has written.

    Returns:
        Name of each layer -> its replacement; empty where heads were trained alone.

    Raises:
        GatesError: The file is missing or damaged, or holds adapters of another base, other layers
            or other heads; the model is then as before.
    """
    facts, tensors = read_known(Path(path), kind=KIND)
    if facts["base"] != (digest := base_digest(model)):
        raise GatesError(
            f"{path} holds adapters of the base model {facts['base']}, this one is {digest}: give"
            " the base that they were trained on"
        )
    if names := other_tokens(facts, model):
        raise GatesError(
            f"{path} holds adapters of a base model with another {names}: give the base that they"
            " were trained on, saved after it was resized or fine-tuned"
        )
    layers: list[str] = json.loads(facts["options"])["layers"]
    present = list(sora_layers(model))
    _check_fit(model, Path(path), layers, present, tensors)
    if layers and not present:
        _attach(model, layers, rank=1)
    model.load_state_dict(tensors, strict=False)
    freeze_base(model)
    return {name: model.get_submodule(name) for name in layers}  # type: ignore[misc]


def export_lora(model: nn.Module, folder: str | Path, *, labels: Sequence[str] = ()) -> Path:
    """Write the adapters of a model as a plain LoRA that PEFT opens, gates folded into B.

    Every layer has the rank that its gates left and the scale 1; layers without any are left out.
    Heads go along as ``modules_to_save``. If the base has changed since the adapters were attached,
    such as by training its embedding, a warning is given, as the LoRA belongs to the changed base.

    Args:
        model: See `attach_sora`.
        folder: Folder that is written, or replaced if it holds a LoRA alone.
        labels: Names of the outputs of the head, kept in ``labels.json``; no such file if empty.

    Returns:
        The folder.

    Raises:
        GatesError: There are no adapters, all gates are zero, one is not finite, or the folder
            holds something else or cannot be written.
    """
    model = getattr(model, "_orig_mod", model)  # torch.compile
    layers = sora_layers(model)
    _refuse_bare(model, layers)
    exported = {name: layer.adapter.export() for name, layer in layers.items()}
    ranks = {name: lora.rank for name, lora in exported.items() if lora.rank}
    if not ranks:
        raise GatesError(
            f"all gates of {len(layers)} layers are zero, so there is no LoRA to export: train with"
            " a smaller threshold"
        )
    tensors: dict[str, Tensor] = {}
    for name in ranks:
        if not all(factor.isfinite().all() for factor in (exported[name].down, exported[name].up)):
            raise GatesError(f"the adapter of {name} is not finite: train with a smaller rate")
        tensors[f"{PREFIX}{name}.lora_A.weight"] = exported[name].down
        tensors[f"{PREFIX}{name}.lora_B.weight"] = exported[name].up
    heads = heads_of(model)
    kept = tuple(f"{head}." for head in heads)
    tensors |= {f"{PREFIX}{n}": t for n, t in model.state_dict().items() if n.startswith(kept)}
    plain = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    facts = vars(model)["sora_facts"]
    if facts["base"] != base_digest(model) or other_tokens(facts, model):
        warnings.warn(
            "the base model has changed since its adapters were attached, so the LoRA does not fit"
            " the original: save the base, too, after detach_adapters(model)",
            stacklevel=2,
        )
    refuse_strangers(folder := Path(folder), (CONFIG, WEIGHTS, LABELS))
    with replacing(folder) as temporary:
        temporary.mkdir(parents=True)
        write_json(temporary / CONFIG, _config_of(model, ranks, heads))
        save_file(plain, temporary / WEIGHTS, metadata={"format": "pt"})
        if labels:
            write_json(temporary / LABELS, {"labels": list(labels)})
    return folder


def _config_of(model: nn.Module, ranks: Mapping[str, int], heads: Sequence[str]) -> dict[str, Any]:
    """Return the configuration of PEFT; its general rank must be that of some layer."""
    layers = sora_layers(model)
    rank = max(ranks.values())
    kind = type(model).__name__
    return {
        "peft_type": "LORA",
        "task_type": next((task for part, task in TASKS.items() if part in kind), None),
        "base_model_name_or_path": getattr(base_of(model).config, "_name_or_path", "") or None,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": rank,
        "rank_pattern": dict(ranks),
        "alpha_pattern": dict(ranks),
        "target_modules": list(ranks),
        "modules_to_save": list(heads) or None,
        "fan_in_fan_out": not any(isinstance(layers[name].base, nn.Linear) for name in ranks),
        "lora_dropout": 0.0,
        "bias": "none",
    }


def _attach(model: nn.Module, names: Sequence[str], **options: Any) -> None:
    """Attach adapters to layers by name and freeze the rest.

    Raises:
        GatesError: A layer shares its weight with the token embedding.
    """
    embedding = base_of(model).get_input_embeddings()
    for name in names:
        if embedding is not None and model.get_submodule(name).weight is embedding.weight:
            raise GatesError(
                f"{name} shares its weight with the token embedding, which an adapter would part"
                " from it: leave it out of where"
            )
    adapt = partial(SparseLoraLinear, **options)
    attach_adapters(model, adapt, where=names, kinds=_kinds())
    freeze_base(model)
    vars(model)["sora_facts"] = _facts(model)
    if "save_pretrained" not in vars(model):
        save = partial(_save_pretrained, model, model.save_pretrained)
        model.save_pretrained = save  # type: ignore[assignment]


def _facts(model: nn.Module) -> dict[str, str]:
    """Return what a file of adapters knows of its base."""
    tokens = json.dumps(token_digests(model))
    return {"kind": KIND, "base": base_digest(model), "tokens": tokens}


def _save_pretrained(
    model: nn.Module, save: Any, save_directory: Any, *args: Any, **options: Any
) -> None:
    """Write a model as transformers does, and its adapters next to it, which that cannot open."""
    save(save_directory, *args, **options)
    if sora_layers(model) and options.get("is_main_process", True):
        path = save_sora(model, Path(save_directory) / FILE)
        warnings.warn(
            f"from_pretrained cannot open {save_directory}, as linear layers have adapters: open"
            f" the base and call load_sora(base, {str(path)!r}), or save_pretrained after"
            " detach_adapters(model)",
            stacklevel=3,
        )


def freeze_base(model: nn.Module) -> None:
    """Freeze all of a model but its adapters and heads."""
    model.requires_grad_(False)
    for layer in sora_layers(model).values():
        layer.adapter.requires_grad_(True)
    for head in heads_of(model):
        model.get_submodule(head).requires_grad_(True)


def _check_fit(
    model: nn.Module,
    path: Path,
    layers: Sequence[str],
    present: Sequence[str],
    tensors: Mapping[str, Tensor],
) -> None:
    """Refuse adapters of other layers than those of the model, and other sizes.

    Raises:
        GatesError: They do not fit.
    """
    if present and set(present) != set(layers):
        raise GatesError(
            f"{path} holds adapters of {len(layers)} layers, the model has others on"
            f" {len(present)}: call detach_adapters(model) before"
        )
    prefixes = tuple(f"{head}." for head in heads_of(model))
    needed = {n: tuple(t.shape) for n, t in model.state_dict().items() if n.startswith(prefixes)}
    modules = dict(model.named_modules())
    for name in layers:
        layer = modules.get(name)
        linear = layer.base if isinstance(layer, SparseLoraLinear) else layer
        if not isinstance(linear, _kinds()):
            raise GatesError(f"{path} holds adapters of {name}, no such layer is in the model")
        inputs, outputs = sizes_of(linear)
        down = tensors.get(f"{name}.adapter.lora_A")
        rank = 0 if down is None or not down.ndim else len(down)
        adapter = SparseLowRank(inputs, outputs, rank, device="meta").state_dict()
        needed |= {f"{name}.adapter.{n}": tuple(t.shape) for n, t in adapter.items()}
    stored = {n: tuple(t.shape) for n, t in tensors.items()}
    if needed != stored:
        odd = next(n for n in [*needed, *stored] if needed.get(n) != stored.get(n))
        raise GatesError(
            f"{path} holds {odd} of shape {stored.get(odd)}, the model needs {needed.get(odd)}:"
            " open it with the head and the number of labels that it was trained with"
        )


def _refuse_adapted(model: nn.Module) -> None:
    """Refuse a model that has adapters, of ours or of PEFT."""
    if hasattr(model, "peft_config"):
        raise GatesError(
            f"{type(model).__name__} has adapters of PEFT: call merge_and_unload() before"
        )
    if sora_layers(model):
        raise GatesError(
            f"{type(model).__name__} has a SoRA already: call detach_adapters(model) before"
        )


def _refuse_bare(model: nn.Module, names: Collection[str]) -> None:
    """Refuse a model of which nothing was found that can be written."""
    if not names:
        raise GatesError(
            f"{type(model).__name__} has no SoRA: call attach_sora(model) or load_sora before"
        )


def _kinds() -> tuple[type[nn.Module], ...]:
    from transformers.pytorch_utils import Conv1D

    return nn.Linear, Conv1D
