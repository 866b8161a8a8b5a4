"""Folders of models as transformers writes them: Llama, Qwen3, Mixtral and Qwen3-MoE."""

import json
import shutil
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from core_gates.errors import GatesError
from core_gates.gates.top_k import TopKGate
from core_gates.moe.checkpoint_export import export_state_dict
from core_gates.moe.checkpoint_layouts import Layout
from core_gates.moe.experts import StackedExperts
from core_gates.moe.layer import MoELayer
from harness.files import replacing, write_json
from language.decoder import Decoder
from language.hf.pregating import MARK, level_of, restore_pregates
from language.tokenizer import Tokenizer, load_tokenizer

CONFIG, WEIGHTS, TOKENIZER = "config.json", "model.safetensors", "tokenizer.json"
INDEX, GENERATION = f"{WEIGHTS}.index.json", "generation_config.json"
MADE = (CONFIG, WEIGHTS, TOKENIZER, GENERATION, "tokenizer_config.json")
"""Files of a folder that is written, the first one always."""

BEGIN, ENDS = "bos_token_id", "eos_token_id"
Config = Mapping[str, Any]


class Family(NamedTuple):
    """What distinguishes one family of models.

    Attributes:
        architecture: Class of the model in transformers.
        qk_norm: Whether queries and keys are normed.
        layout: Names of its experts in a file; None without experts.
        defaults: Values of settings that a configuration may leave out.
        mlp: Name of the network of a block in a file.
    """

    architecture: str
    qk_norm: bool
    layout: Layout | None
    defaults: Config
    mlp: str = "mlp"


FAMILIES = {
    "llama": Family("LlamaForCausalLM", False, None, {}),
    "qwen3": Family("Qwen3ForCausalLM", True, None, {"head_dim": 128}),
    "mixtral": Family(
        "MixtralForCausalLM",
        False,
        "mixtral",
        {"rms_norm_eps": 1e-5, "rope_theta": 1e6, "norm_topk_prob": True},
        "block_sparse_moe",
    ),
    "qwen3_moe": Family("Qwen3MoeForCausalLM", True, "qwen3_moe", {}),
}
"""Families by the ``model_type`` of their configurations."""

DEFAULTS = {
    **{"rms_norm_eps": 1e-6, "rope_theta": 1e4, "tie_word_embeddings": False},
    **{"norm_topk_prob": False, "decoder_sparse_step": 1, "hidden_act": "silu"},
}


DTYPES = {torch.float32, torch.bfloat16, torch.float16, torch.float64}


def write_model(
    folder: Path,
    model: Decoder,
    tokenizer: Tokenizer | None,
    *,
    dtype: torch.dtype | None = None,
    source: Path | None = None,
) -> None:
    """Write a decoder and its tokenizer as transformers does; the folder is the old or the new one.

    Without experts it is a Llama, or with ``qk_norm`` a Qwen3. With top-k gates it is a Mixtral, or
    with ``qk_norm`` a Qwen3-MoE.

    Args:
        folder: Folder, which replaces an old one.
        model: The decoder.
        tokenizer: Its tokenizer, if it has one.
        dtype: Floating dtype of the file; that of the model if None.
        source: Folder that the model was read from, whose first and last tokens are kept, and its
            ``generation_config.json``; the end of the tokenizer is both if None.

    Raises:
        GatesError: The model is of none of these families, the tokenizer has more tokens than the
            model, ``dtype`` cannot hold a weight, or the folder cannot be written.
    """
    config = _config_of(model)
    if tokenizer is not None:
        if tokenizer.vocab_size > model.vocab_size:
            raise GatesError(
                f"the tokenizer has {tokenizer.vocab_size} tokens, but the model"
                f" {model.vocab_size}: write the tokenizer that it was trained with"
            )
        config |= {BEGIN: tokenizer.end, ENDS: tokenizer.end}
    if source is not None:
        given = _read_json(source / CONFIG)
        config |= {name: given[name] for name in (BEGIN, ENDS) if name in given}
    state = _state_of(model, FAMILIES[config["model_type"]])
    state = {name: value.to("cpu", dtype).contiguous() for name, value in state.items()}
    if dtype is not None:
        _refuse_infinite(state, dtype)
    config["dtype"] = str(state["model.norm.weight"].dtype).removeprefix("torch.")
    with replacing(Path(folder)) as temporary:
        temporary.mkdir(parents=True)
        write_json(temporary / CONFIG, config)
        save_file(state, temporary / WEIGHTS, metadata={"format": "pt"})
        if tokenizer is not None:
            tokenizer.save(temporary)
        if source is not None and (source / GENERATION).is_file():
            shutil.copyfile(source / GENERATION, temporary / GENERATION)


def _refuse_infinite(state: Mapping[str, Tensor], dtype: torch.dtype) -> None:
    """Refuse weights that a dtype cannot hold."""
    lost = [name for name, value in state.items() if not value.isfinite().all()]
    if lost:
        raise GatesError(
            f"{lost[0]} is not finite in {dtype}, nor are {len(lost) - 1} more: choose bfloat16 or"
            " float32"
        )


def _config_of(model: Decoder) -> dict[str, Any]:
    """Return the ``config.json`` of a decoder, without the tokens that its tokenizer names.

    Raises:
        GatesError: No family computes what it does.
    """
    attention = model.blocks[0].self_attn
    if attention.gate is not None or attention.attend is not None:
        place = "blocks" if attention.gate is None else attention.position
        raise GatesError(
            f"no family of transformers has gates at {place} of attention: keep the"
            " checkpoint of this one"
        )
    normed = attention.q_norm is not None
    layers = [block.mlp for block in model.blocks if isinstance(block.mlp, MoELayer)]
    for layer in layers:
        _refuse_unknown(layer)
    config = {
        "vocab_size": model.vocab_size,
        "hidden_size": model.dim,
        "intermediate_size": model.hidden_dim,
        "num_hidden_layers": len(model.blocks),
        "num_attention_heads": attention.num_heads,
        "num_key_value_heads": attention.num_kv_heads,
        "head_dim": attention.head_dim,
        "hidden_act": "silu",
        "attention_bias": False,
        "max_position_embeddings": model.context,
        "rms_norm_eps": model.norm_eps,
        "rope_theta": model.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": model.rope_theta},
        "tie_word_embeddings": model.tie_embeddings,
    }
    if not layers:
        kind = "qwen3" if normed else "llama"
    elif normed:
        kind = "qwen3_moe"
        config |= _experts_of(layers[0]) | {"decoder_sparse_step": model.moe_every}
    else:
        kind, experts = "mixtral", _experts_of(layers[0])
        if model.moe_every > 1 or not experts["norm_topk_prob"]:
            raise GatesError(
                "a Mixtral has experts in every block, and weights that sum to 1: set qk_norm for"
                f" a Qwen3-MoE, found moe_every={model.moe_every} and"
                f" renormalize={experts['norm_topk_prob']}"
            )
        config["num_local_experts"] = experts["num_experts"]
        config["num_experts_per_tok"] = experts["num_experts_per_tok"]
        config["intermediate_size"] = experts["moe_intermediate_size"]
    if kind == "llama" and model.dim % attention.num_heads:
        raise GatesError(
            f"a Llama of {attention.num_heads} heads has features divisible by that, found"
            f" dim={model.dim}: choose another dim, or qk_norm for a Qwen3"
        )
    level = level_of(model)
    config |= {} if level is None else {MARK: level}
    return {"architectures": [FAMILIES[kind].architecture], "model_type": kind, **config}


def _refuse_unknown(layer: MoELayer) -> None:
    """Refuse a layer that no family has."""
    gate, experts = cast(Any, layer.gate), layer.experts
    if type(gate) is not TopKGate:
        raise GatesError(
            f"{type(gate).__name__} is a gate that no family of transformers has: only a TopKGate"
            " itself, no subclass of it, can be written, keep the checkpoint of this one"
        )
    if gate.bias is not None:
        raise GatesError(
            "the TopKGate has a bias, which a Mixtral or Qwen3-MoE lacks: build it without one, or"
            " keep the checkpoint of this one"
        )
    form = {"activation": "silu", "gated": True, "down_proj_bias": None}
    layout = {name: getattr(experts, name, None) for name in form}
    if type(experts) is not StackedExperts or layout != form:
        raise GatesError(
            f"transformers has no model with these {type(experts).__name__} here: only gated"
            " StackedExperts with silu and without biases can be written"
        )


def _experts_of(layer: MoELayer) -> dict[str, Any]:
    gate, experts = cast(Any, layer.gate), layer.experts
    return {
        "num_experts": gate.num_experts,
        "num_experts_per_tok": gate.k,
        "norm_topk_prob": gate.renormalize,
        "moe_intermediate_size": experts.hidden_dim,
    }


def _state_of(model: Decoder, family: Family) -> dict[str, Tensor]:
    """Return the state under the names of files; what is tied is there once."""
    if family.layout is None:
        state = dict(model.state_dict())
    else:
        state = export_state_dict(model, family.layout)
    if model.tie_embeddings:
        del state["lm_head.weight"]
    return {name.replace(".mlp.", f".{family.mlp}."): value for name, value in state.items()}


def read_model(folder: Path) -> tuple[Decoder, Tokenizer | None]:
    """Read a folder of a Llama, Qwen3, Mixtral or Qwen3-MoE as transformers writes it.

    Args:
        folder: Holds ``config.json``, and ``model.safetensors`` or the index of its shards.

    Returns:
        The decoder, in evaluation mode and the dtype of the file, and the tokenizer if the folder
        holds a ``tokenizer.json``.

    Raises:
        GatesError: A file is absent or damaged, the model is of another family or has a part that
            the decoder does not compute, or weights are missing, unknown or of other sizes.
    """
    folder = Path(folder)
    config, family = _read_config(folder / CONFIG)
    model = _empty(folder / CONFIG, config, family)
    setattr(model, MARK, config.get(MARK))
    state = {
        name.replace(f".{family.mlp}.", ".mlp."): value
        for name, value in _read_weights(folder).items()
        if not name.endswith("rotary_emb.inv_freq")  # of old versions, computed here
    }
    kinds = {value.dtype: name for name, value in state.items()}
    if len(kinds) > 1 or not kinds.keys() <= DTYPES:
        mixed = ", ".join(f"{name} in {kind}" for kind, name in kinds.items())
        raise GatesError(
            f"{folder} has {mixed}: expected all weights in one of float32, bfloat16, float16 and"
            " float64, get them so"
        )
    if model.tie_embeddings:
        state["lm_head.weight"] = state.get("model.embed_tokens.weight", torch.empty(0))
    try:
        missing, unexpected = model.load_state_dict(state, strict=False, assign=True)
    except RuntimeError as error:  # sizes; one line per weight after the first
        raise GatesError(f"{folder}: {str(error).splitlines()[1].strip()}") from error
    for names, what in ((missing, "lacks"), (unexpected, "holds the unknown")):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise GatesError(
                f"{folder} {what} {names[0]}{more}: its weights are not those of its {CONFIG}"
            )
    model.tie_weights()
    restore_pregates(model)
    tokenizer = load_tokenizer(folder) if (folder / TOKENIZER).exists() else None
    return model.eval(), tokenizer


def read_marks(folder: Path) -> tuple[int | None, tuple[int, ...]]:
    """Read with which token texts begin and with which they end, by ``generation_config.json`` too.

    Args:
        folder: Of a model, see `read_model`.

    Returns:
        The first token and the last ones; None and none where the folder names none.

    Raises:
        GatesError: A file cannot be read, or what it names is no token.
    """
    marks = _read_json(folder / CONFIG)
    if (folder / GENERATION).is_file():
        named = _read_json(folder / GENERATION)
        marks |= {name: named[name] for name in (BEGIN, ENDS) if named.get(name) is not None}
    begin, ends = marks.get(BEGIN), marks.get(ENDS)
    ends = ends if isinstance(ends, list) else [] if ends is None else [ends]
    for token in (*ends, 0 if begin is None else begin):
        if type(token) is not int or token < 0:
            raise GatesError(f"{folder} names the token {token!r}, expected an integer from 0")
    return begin, tuple(ends)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise GatesError(f"{path} does not exist: name the folder of a model") from error
    except (OSError, ValueError, RecursionError) as error:
        raise GatesError(f"{path} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise GatesError(f"{path} holds no JSON object, get it again")
    return content


def _read_config(path: Path) -> tuple[dict[str, Any], Family]:
    """Return the configuration with defaults, and the family.

    Raises:
        GatesError: The family is another one, or a setting changes what the model computes.
    """
    given = {name: value for name, value in _read_json(path).items() if value is not None}
    kind = given.get("model_type")
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise GatesError(
            f"{path} is that of a model of type {kind!r}, expected {', '.join(FAMILIES)}"
        )
    rope = given.get("rope_parameters") or given.get("rope_scaling") or {}
    has_theta = isinstance(rope, dict) and rope.get("rope_theta") is not None
    theta = {"rope_theta": rope["rope_theta"]} if has_theta else {}
    config = {**DEFAULTS, **FAMILIES[kind].defaults, **given, **theta}
    for name, refused in _REFUSED.items():
        if refused(config):
            raise GatesError(
                f"{path} has {name}={config[name]!r}, which this decoder does not compute"
            )
    return config, FAMILIES[kind]


def _scaled(name: str, config: Config) -> bool:
    rope = config.get(name, {})
    if not isinstance(rope, dict) or rope.keys() - {"rope_type", "type", "rope_theta"}:
        return True
    return any(rope.get(key, "default") != "default" for key in ("rope_type", "type"))


def _is_full(kinds: Any) -> bool:
    return isinstance(kinds, list) and all(kind == "full_attention" for kind in kinds)


_REFUSED: dict[str, Callable[[Config], bool]] = {
    "rope_scaling": partial(_scaled, "rope_scaling"),
    "rope_parameters": partial(_scaled, "rope_parameters"),
    "partial_rotary_factor": lambda config: config.get("partial_rotary_factor", 1.0) != 1.0,
    "use_sliding_window": lambda config: bool(config.get("use_sliding_window")),
    "sliding_window": lambda config: (
        config["model_type"] == "mixtral" and "sliding_window" in config
    ),
    "layer_types": lambda config: not _is_full(config.get("layer_types", [])),
    "tie_word_embeddings": lambda config: type(config["tie_word_embeddings"]) is not bool,
    "norm_topk_prob": lambda config: type(config["norm_topk_prob"]) is not bool,
    "attention_bias": lambda config: bool(config.get("attention_bias")),
    "mlp_bias": lambda config: bool(config.get("mlp_bias")),
    "hidden_act": lambda config: config["hidden_act"] not in ("silu", "swish"),
    "mlp_only_layers": lambda config: bool(config.get("mlp_only_layers")),
    "quantization_config": lambda config: "quantization_config" in config,
}
"""Settings with which a model computes something else."""


def _empty(path: Path, config: Config, family: Family) -> Decoder:
    """Return a decoder without weights.

    Raises:
        GatesError: A size is absent or no number, or the sizes do not fit.
    """
    options: dict[str, Any] = {}
    try:
        if family.layout is not None:
            mixtral = family.layout == "mixtral"
            number = config.get("num_experts") or config["num_local_experts"]  # by version
            hidden = config["intermediate_size" if mixtral else "moe_intermediate_size"]
            options["gate"] = partial(
                TopKGate,
                num_experts=number,
                k=config["num_experts_per_tok"],
                renormalize=config["norm_topk_prob"],
            )
            options["experts"] = partial(StackedExperts, hidden_dim=hidden)
        return Decoder(
            config["vocab_size"],
            config["hidden_size"],
            config["num_hidden_layers"],
            config["num_attention_heads"],
            config.get("num_key_value_heads"),
            head_dim=config.get("head_dim"),
            hidden_dim=config["intermediate_size"],
            context=config["max_position_embeddings"],
            qk_norm=family.qk_norm,
            norm_eps=config["rms_norm_eps"],
            rope_theta=config["rope_theta"],
            tie_embeddings=config["tie_word_embeddings"],
            moe_every=config["decoder_sparse_step"],
            device="meta",
            **options,
        )
    except KeyError as error:
        raise GatesError(f"{path} lacks {error.args[0]}, get it again") from error
    except (ValueError, TypeError, RuntimeError, OverflowError) as error:
        raise GatesError(f"{path}: {str(error).splitlines()[0]}") from error


def _read_weights(folder: Path) -> dict[str, Tensor]:
    """Return all weights of a folder, which the system reads when they are used.

    Raises:
        GatesError: A file is absent or damaged.
    """
    if not (folder / INDEX).exists():
        return _read_shard(folder / WEIGHTS)
    shards = _read_json(folder / INDEX).get("weight_map")
    if not isinstance(shards, dict) or not shards:
        raise GatesError(f"{folder / INDEX} has no weight_map, get it again")
    files = sorted({str(name).encode(errors="replace").decode() for name in shards.values()})
    there = {path.name for path in folder.iterdir() if path.is_file()}
    absent = [name for name in files if name not in there]
    if absent:
        raise GatesError(
            f"{folder} lacks {len(absent)} of {len(files)} shards, the first is {absent[0]}: get"
            " them again"
        )
    state: dict[str, Tensor] = {}
    for name in files:
        state |= _read_shard(folder / name)
    return state


def _read_shard(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except FileNotFoundError as error:
        raise GatesError(f"{path} does not exist, nor does {INDEX}: get the weights") from error
    except (SafetensorError, OSError) as error:
        raise GatesError(f"{path} is damaged: {error}; get it again") from error
