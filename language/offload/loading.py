"""Checkpoints opened without their experts."""

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from core_gates.errors import GatesError
from language.hf.locate import require_transformers
from language.hf.pregating import restore_pregates
from language.hf.pretrained import CONFIG, in_one_line
from language.offload.expert_store import ExpertStore
from language.offload.pool import device_of
from language.offload.runtime import attach_offload

GENERATION = "generation_config.json"
LOCAL = {"local_files_only": True, "trust_remote_code": False}


def load_offloaded(
    folder: Path | str, *, budget: float, device: torch.device | str = "cpu", **options: Any
) -> Any:
    """Open a mixture model whose experts stay in its folder.

    Parameters of experts are never allocated; all other tensors are read. The model is in
    evaluation mode, and no parameter asks for a gradient.

    Args:
        folder: Checkpoint as transformers writes it, in safetensors.
        budget: Bytes for experts; a float up to 1.0 is a fraction of the bytes of all experts.
        device: Where the model runs.
        options: Those of `language.offload.runtime.attach_offload`.

    Returns:
        The model, a class of transformers; ``generate`` works unchanged.

    Raises:
        GatesError: What ``attach_offload`` refuses; the folder holds no such model, is quantized,
            or lacks tensors.
    """
    folder = Path(folder)
    from accelerate import init_empty_weights

    auto = require_transformers()
    remedy = "give the folder of a mixture model as transformers writes it"
    if not (folder / CONFIG).is_file():  # else transformers tells of its site
        raise GatesError(f"{folder} holds no {CONFIG}: {remedy}")
    with in_one_line(f"{folder} holds no model that continues text", remedy):
        config = auto.AutoConfig.from_pretrained(folder, **LOCAL)
        with init_empty_weights(include_buffers=False):
            model = auto.AutoModelForCausalLM.from_config(
                config, dtype=config.dtype or torch.float32
            )
        if (folder / GENERATION).is_file():
            model.generation_config = auto.GenerationConfig.from_pretrained(folder, **LOCAL)
    if getattr(config, "quantization_config", None) is not None:
        raise GatesError(f"{folder} is quantized: give the checkpoint in bfloat16 or float32")
    model.requires_grad_(requires_grad=False).eval()
    restore_pregates(model)
    device = device_of(device)
    offload = attach_offload(model, folder, budget=budget, device=device, **options)
    try:
        _read_others(model, offload.store, device)
    except GatesError:
        offload.close()
        raise
    return model


def _read_others(model: Any, store: ExpertStore, device: torch.device) -> None:
    """Read the parameters and buffers that are not of experts; old files may have further ones.

    Raises:
        GatesError: One is missing, or has another shape; or there are more experts.
    """
    places = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    plan: dict[str, torch.dtype] = model._get_dtype_plan(model.dtype)
    tensors: dict[str, Tensor] = {}
    ignored = "|".join(model._keys_to_ignore_on_load_unexpected or ["^$"])
    for name in sorted(store.others.keys() - places.keys()):
        if ".experts." in name and not re.search(ignored, name):
            raise GatesError(
                f"{store.folder} has {name}, which its config.json has no place for: copy both from"
                " the same checkpoint"
            )
    for name in store.others.keys() & places.keys():
        if store.others[name].shape != places[name].shape:
            raise GatesError(
                f"{store.folder} has {name} as {store.others[name].shape}, but its config.json"
                f" needs {tuple(places[name].shape)}: copy the whole checkpoint"
            )
        kept = (dtype for part, dtype in plan.items() if re.search(part.replace("*", ".*"), name))
        dtype = next(kept, places[name].dtype)
        tensors[name] = store.read_other(name).to(device, dtype)
    model.load_state_dict(tensors, strict=False, assign=True)
    model.requires_grad_(requires_grad=False).tie_weights()
    for buffers in (module._buffers for module in model.modules()):
        buffers.update(
            {name: one if one is None else one.to(device) for name, one in buffers.items()}
        )
    kept_buffers = {
        f"{name}.{buffer}"
        for name, module in model.named_modules()
        for buffer in module._buffers.keys() - module._non_persistent_buffers_set
    }
    absent = [name for name, one in model.named_parameters() if one.is_meta]
    if absent := absent + sorted(kept_buffers - tensors.keys()):
        raise GatesError(f"{store.folder} lacks {absent[0]}: copy the whole checkpoint")
