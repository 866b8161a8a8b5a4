"""Folders of Gated Attention as published: gates fused into the projection of the queries."""

import json
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from core_gates.attention.head_gate import Granularity, fuse_q_proj, split_fused_q_proj
from core_gates.errors import GatesError
from harness.files.atomic import replacing
from language.gated.attach import CHILD, attach_output_gate, output_gates
from language.hf.gate_file import read_tensors
from language.hf.locate import base_of

WEIGHTS, INDEX, CONFIG = "model.safetensors", "model.safetensors.index.json", "config.json"
FLAGS: dict[str, Granularity] = {
    "headwise_attn_output_gate": "headwise",  # wins if both are set
    "elementwise_attn_output_gate": "elementwise",
}
"""Names in the configuration of the reference, and what they mean."""

FUSED = re.compile(r"(.*\.self_attn)\.q_proj\.(weight|bias)")


def read_published(folder: str | Path, *, dtype: torch.dtype | None = None) -> nn.Module:
    """Open a published folder as a stock Qwen3 with output gates.

    The reference (qiuzh20/gated_attention) keeps one projection of queries and gates, grouped by
    key head. Biases of attention exist if ``qkv_bias`` is set; where that is absent,
    ``attention_bias`` counts.

    Args:
        folder: ``config.json`` and safetensors, in one file or in several with their index.
        dtype: Of the model; that of the file if None.

    Returns:
        A ``Qwen3ForCausalLM`` in evaluation mode, gates attached.

    Raises:
        MissingExtraError: transformers is not installed.
        GatesError: The folder is not such a model, or is incomplete or damaged.
    """
    folder = Path(folder)
    facts = _json(folder / CONFIG)
    kind = next((FLAGS[flag] for flag in FLAGS if facts.get(flag)), None)
    if facts.get("model_type") != "qwen3" or kind is None:
        raise GatesError(
            f"{folder / CONFIG} is of model_type {facts.get('model_type')!r} without a flag of"
            f" gates, expected 'qwen3' with one of {', '.join(FLAGS)}: open it with transformers"
        )
    state = _tensors(folder)
    config = _config(facts)
    heads = (config.num_attention_heads, config.num_key_value_heads, config.head_dim)
    rows = heads[0] if kind == "headwise" else heads[0] * heads[2]
    gates = {}
    for name in [name for name in state if FUSED.fullmatch(name)]:
        try:
            state[name], gate = split_fused_q_proj(state[name], *heads)
        except ValueError as error:
            raise GatesError(f"{folder}: {name}: {error}; get the folder again") from error
        if len(gate) != rows:
            raise GatesError(
                f"{folder}: {name} has {len(gate)} rows of gates, expected {rows} ({kind}):"
                f" correct the flag in {CONFIG}"
            )
        gates[FUSED.sub(rf"\1.{CHILD}.\2", name)] = gate
    dtype = dtype or next(iter(state.values())).dtype
    model = _stock(config, dtype)
    bias = 0.0 if config.attention_bias else None
    attach_output_gate(model, granularity=kind, bias_init=bias)
    if config.tie_word_embeddings:
        state.setdefault("lm_head.weight", state.get("model.embed_tokens.weight", torch.empty(0)))
    try:
        model.load_state_dict(state | gates)
    except RuntimeError as error:
        first = " ".join(str(error).splitlines()[1:2]).strip()
        raise GatesError(f"{folder} does not fit its {CONFIG}: {first}") from error
    return model.eval()


def write_published(model: nn.Module, folder: str | Path) -> Path:
    """Write a Qwen3 with output gates as the reference reads it, exactly: the inverse of reading.

    Args:
        model: A ``Qwen3ForCausalLM`` with sigmoid gates, one for each head or feature, that have a
            bias if and only if its attention has.
        folder: A new folder, written whole or not at all. The tokenizer is not part of it.

    Returns:
        The folder.

    Raises:
        GatesError: The folder exists or cannot be written, or the layout cannot hold the model.
    """
    folder = Path(folder)
    gates = output_gates(model)
    base: Any = base_of(model)
    config, options = base.config, next(iter(gates.values())).options
    plain = {"sharing": "head_specific", "form": "multiplicative", "activation": "sigmoid"}
    wrong = [f"{key}={options[key]!r}" for key in plain if options[key] != plain[key]]
    if (options["bias_init"] is not None) != bool(getattr(config, "attention_bias", None)):
        wrong.append(f"bias_init={options['bias_init']}")
    if type(model).__name__ != "Qwen3ForCausalLM" or wrong:
        raise GatesError(
            f"{type(model).__name__} with gates of {', '.join(wrong) or 'any kind'} has no"
            " published layout, expected Qwen3ForCausalLM with sigmoid gates, biased like its"
            " attention: use save_gates"
        )
    if folder.exists():
        raise GatesError(f"{folder} exists: choose another folder")
    state = model.state_dict()
    for name, gate in gates.items():
        for kind in gate.state_dict():
            rows = state.pop(f"model.{name}.{CHILD}.{kind}")
            fused = f"model.{name}.q_proj.{kind}"
            state[fused] = fuse_q_proj(state[fused], rows, config.num_key_value_heads)
    flags: dict[str, Any] = {flag: FLAGS[flag] == options["granularity"] for flag in FLAGS}
    with replacing(folder) as temporary:
        model.save_pretrained(temporary, state_dict=state)  # type: ignore[operator]
        facts = _json(temporary / CONFIG)
        theta = facts.get("rope_parameters", {}).get("rope_theta", 10000.0)  # read by the reference
        facts |= flags | {"qkv_bias": bool(config.attention_bias), "rope_theta": theta}
        (temporary / CONFIG).write_text(json.dumps(facts, indent=2, sort_keys=True) + "\n")
    return folder


def _config(facts: dict[str, Any]) -> Any:
    """Return the configuration of the stock model."""
    from transformers import Qwen3Config

    names = (*FLAGS, "qkv_bias", "auto_map", "architectures", "transformers_version")
    bias = facts.get("qkv_bias", facts.get("attention_bias", False))
    kept = {name: value for name, value in facts.items() if name not in names}
    return Qwen3Config.from_dict(kept | {"attention_bias": bool(bias)})


def _stock(config: Any, dtype: torch.dtype) -> Any:
    """Return a Qwen3 whose parameters are not drawn."""
    from transformers import Qwen3ForCausalLM
    from transformers.initialization import no_init_weights

    with no_init_weights():
        return Qwen3ForCausalLM._from_config(config, dtype=dtype)


def _tensors(folder: Path) -> dict[str, Tensor]:
    """Return the tensors of a folder, of one file or of those in its index."""
    if not (folder / INDEX).is_file():
        return read_tensors(folder / WEIGHTS)[1]
    files = sorted(set(_json(folder / INDEX).get("weight_map", {}).values()))
    parts = (read_tensors(folder / file)[1] for file in files)
    return {name: tensor for part in parts for name, tensor in part.items()}


def _json(path: Path) -> dict[str, Any]:
    """Return a JSON object.

    Raises:
        GatesError: The file is missing, or is something else.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise GatesError(f"{path} cannot be read as JSON: {error}; check the path") from error
    if not isinstance(content, dict):
        raise GatesError(f"{path} holds no JSON object: get the folder again")
    return content
