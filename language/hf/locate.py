"""Where the attention of a model of transformers is: inputs, output projections, heads."""

import re
from typing import Any, NamedTuple, TypeVar

from packaging.version import Version
from torch import nn

from core_gates.errors import GatesError

QUERIES = ("q_proj", "q_a_proj", "qkv_proj", "query_key_value", "c_attn", "Wqkv", "Wq", "project_q")
"""Names of the projection that makes queries; a module with one of them is attention."""

OUTPUTS = ("o_proj", "out_proj", "dense", "c_proj", "Wo", "attention_out")
"""Names of the projection of the heads, the last step of attention."""

HEADS = ("num_heads", "num_attention_heads", "n_heads", "n_head")
SIZES = ("v_head_dim", "head_dim", "head_size")
KEY_HEADS = ("num_key_value_heads", "num_kv_heads", "kv_heads")
CROSS = re.compile("cross|encoder_attn")
G = TypeVar("G", bound=nn.Module)

OLDEST = "5.24"
"""The first version of transformers whose models call their cache ``cache``; older ones ignore a
cache of that name and forget the past."""


class Attention(NamedTuple):
    """The attention of one layer.

    Attributes:
        name: Name of the module within the base model, such as ``layers.0.self_attn``.
        module: The module; the normed input of the layer is its ``hidden_states`` (B, T, dim).
        queries: Name of its projection of queries, which may make keys and values as well.
        projection: Name of its output projection, whose input are the heads (B, T, H * D).
        dim: Features of the input.
        num_heads: Query heads H.
        num_kv_heads: Key heads K.
        head_dim: Features D that a head contributes to the output projection.
    """

    name: str
    module: nn.Module
    queries: str
    projection: str
    dim: int
    num_heads: int
    num_kv_heads: int
    head_dim: int


def require_transformers() -> Any:
    """Return transformers.

    Raises:
        MissingExtraError: It is not installed.
        GatesError: It is older than `OLDEST`.
    """
    import transformers

    if Version(transformers.__version__) < Version(OLDEST):
        raise GatesError(
            f"transformers {transformers.__version__} is too old, expected {OLDEST} or newer, whose"
            f" models know a cache by the name that we give: pip install 'transformers>={OLDEST}'"
        )
    return transformers


def base_of(model: nn.Module) -> Any:
    """Return the model of transformers itself, without PEFT around it and without its head.

    Raises:
        MissingExtraError: transformers is not installed.
        GatesError: It is too old, or ``model`` is not a model of transformers.
    """
    PreTrainedModel = require_transformers().PreTrainedModel
    inner: Any = model
    while not isinstance(inner, PreTrainedModel) and hasattr(inner, "get_base_model"):
        inner = inner.get_base_model()  # PEFT
    inner = getattr(inner, "_orig_mod", inner)  # torch.compile
    if not isinstance(inner, PreTrainedModel):
        raise GatesError(
            f"{type(model).__name__} is not a model of transformers: open it with"
            " AutoModelForCausalLM.from_pretrained"
        )
    return inner.base_model


def locate_attention(model: nn.Module) -> list[Attention]:
    """Find the attention of each layer of a decoder.

    Args:
        model: A decoder of transformers with or without a head, PEFT or ``torch.compile`` around
            it; modules that several layers share are found once.

    Returns:
        The attention of the layers, in the order of the modules.

    Raises:
        MissingExtraError: transformers is not installed.
        GatesError: The model is an encoder, has one, or has attention without an output projection
            or with heads that are unknown.
    """
    base = base_of(model)
    refuse_encoders(base.config, type(base).__name__)
    located = [
        (name, module, _first(QUERIES, module))
        for name, module in base.named_modules()
        if _first(QUERIES, module)
    ]
    if not located:
        raise GatesError(
            f"{type(base).__name__} has no attention that is known: looked for modules with one of"
            f" {', '.join(QUERIES)}"
        )
    has_index = any(hasattr(module, "layer_idx") for _, module, _ in located)
    for name, module, _ in located:
        stray = has_index and not hasattr(module, "layer_idx")
        if stray or CROSS.search(name) or getattr(module, "is_causal", True) is False:
            raise GatesError(
                f"{name} ({type(module).__name__}) is attention of an encoder or to one, expected"
                " a decoder alone: give the language model inside, such as model.language_model"
            )
    return [_described(name, module, queries, base.config) for name, module, queries in located]


def attached(model: nn.Module, child: str, kind: type[G]) -> dict[str, G]:
    """Return the gates of a model by the names of their attention modules, if it has any.

    Args:
        model: See `locate_attention`.
        child: Name of a gate in its attention module.
        kind: Its type.

    Raises:
        GatesError: The model does not fit.
    """
    return {
        attention.name: gate
        for attention in locate_attention(model)
        if isinstance(gate := attention.module._modules.get(child), kind)
    }


def require_attached(model: nn.Module, child: str, kind: type[G], attach: str) -> dict[str, G]:
    """Return the attached gates by layer, and refuse a model without any.

    Raises:
        GatesError: There are none; the message names the function ``attach``. Or the model does not
            fit.
    """
    gates = attached(model, child, kind)
    if not gates:
        name = child.replace("_", " ")
        raise GatesError(f"{type(model).__name__} has no {name}s: call {attach}(model) before")
    return gates


def refuse_absent(name: str, module: nn.Module) -> None:
    """Refuse a module whose weights are not in memory.

    Args:
        name: Of the module, for the message.
        module: The module.

    Raises:
        GatesError: Weights are on the meta device.
    """
    absent = [key for key, weight in module.named_parameters() if weight.is_meta]
    if absent:
        raise GatesError(
            f"{name} has {len(absent)} weights on the meta device ({absent[0]}), as accelerate"
            " offloads them, expected all in memory: open the model without device_map, or with one"
            " that offloads nothing"
        )


def features_into(linear: nn.Module) -> int | None:
    """Return the number of features that a linear layer takes, ``Conv1D`` of GPT-2 included."""
    return getattr(linear, "in_features", getattr(linear, "nx", None))


def refuse_encoders(config: Any, name: str) -> None:
    """Refuse the configuration of a model that is an encoder, or has one.

    Args:
        config: Of transformers.
        name: Of the model, for the message.

    Raises:
        GatesError: It is.
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

    if getattr(config, "is_encoder_decoder", False):
        kind = "an encoder and a decoder"
    elif config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not getattr(
        config, "is_decoder", False
    ):
        kind = "an encoder"
    else:
        return
    raise GatesError(
        f"{name} ({config.model_type}) is {kind}, expected a decoder alone: give a causal language"
        " model"
    )


def _described(name: str, module: nn.Module, queries: str, config: Any) -> Attention:
    """Return what is known of an attention module.

    Raises:
        GatesError: It has no output projection, or its heads do not fit that.
    """
    shown = f"{name} ({type(module).__name__})"
    projection = _first(OUTPUTS, module)
    if not projection:
        raise GatesError(
            f"{shown} has no output projection: looked for {', '.join(OUTPUTS)} next to {queries}"
        )
    width = features_into(getattr(module, projection))
    dim = features_into(getattr(module, queries))
    text = config.get_text_config()
    if getattr(text, "is_heterogeneous", False):  # sizes differ between layers
        text = text.per_layer_config[module.layer_idx]
    heads = _count(HEADS, module)
    if not heads and (size := _count(SIZES, module)):
        heads = (width or 0) // size
    heads = heads or _count(HEADS, text)
    if not (width and dim and heads) or width % heads:
        raise GatesError(
            f"{shown}: {projection} takes {width} features of {heads} heads and {queries} takes"
            f" {dim}, expected linear layers and a width that the heads divide: this attention is"
            " not supported"
        )
    key_heads = _count(KEY_HEADS, module, text) or heads
    return Attention(name, module, queries, projection, dim, heads, key_heads, width // heads)


def _count(names: tuple[str, ...], *places: Any) -> int | None:
    """Return the first number with one of these names, of a module or of its configuration."""
    values = (getattr(place, name, None) for place in places for name in names)
    return next((value for value in values if isinstance(value, int)), None)


def _first(names: tuple[str, ...], module: nn.Module) -> str:
    """Return the first of these names that is a child of a module, empty if none is."""
    return next((name for name in names if name in module._modules), "")
