"""Pre-gated models: the gate of a layer of experts reads the input of an earlier one."""

from functools import cache
from pathlib import Path
from typing import Any, cast

from torch import Tensor, nn

from core_gates.errors import GatesError
from harness.files import refuse_strangers, replacing, write_text

MARK = "pregate_level"
"""Setting of a configuration, and attribute of a decoder of ours, that tells the level."""

MADE = ("README.md", "config.json", "generation_config.json", "model*.safetensors*")
"""Files of a folder that is written, the first one always."""

CARRIED = "_earlier_gate_inputs"
ROUTERS = ("gate", "router")
CARD = """---
library_name: transformers
---
# A pre-gated mixture model

The experts of a token in a layer are chosen by the gate input of {level} layers of experts before
it (Pre-gated MoE, arXiv 2308.12066), so that they can be fetched in time.

**transformers opens this folder without a word as a conventional model**, whose layers choose by
the input of the same layer. It was not trained for that and computes something else. Open it with

    from language.hf.pretrained import open_model

    model = open_model("FOLDER")

of gatesuite, which reads `{mark}` of `config.json`.
"""


class EarlierInputs:
    """The gate inputs of earlier layers, while one block of a model computes.

    Args:
        level: How many layers of experts lie between a decision and its use.
        before: Layers of experts before the block.
    """

    def __init__(self, level: int, before: int) -> None:
        self.level, self.before = level, before
        self.inputs: tuple[Tensor, ...] | None = None

    def begin(self, x: Tensor) -> None:
        """Take what earlier blocks have left on their output (..., D).

        Raises:
            GatesError: It is lost.
        """
        carried: tuple[Tensor, ...] = getattr(x, CARRIED, ())
        if len(carried) != min(self.level, self.before):
            raise GatesError(
                "what gates of earlier layers have read is lost: checkpoint activations with"
                " use_reentrant=False, call whole models, and keep blocks on one device"
            )
        self.inputs = carried

    def route(self, _router: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """Give the gate the input of an earlier layer, and keep its own for a later one."""
        if self.inputs is None:  # called by something else than its block
            return None
        hidden, *others = args
        used = hidden if self.before < self.level else self.inputs[-self.level]
        self.inputs = (*self.inputs, hidden)[-self.level :]
        return (used, *others)

    def end(self, out: Tensor) -> Tensor:
        """Attach the stored gate inputs to the output of a block for later gates; return it."""
        setattr(out, CARRIED, self.inputs)
        return out


@cache
def _pregated(kind: type[nn.Module]) -> type[nn.Module]:
    """Return a class of blocks of the same name that carry gate inputs from one to the next.

    They are carried by the output itself. A block that is computed again, by checkpointing, is
    given the same tensor, and nothing outlives the forward pass in the model.
    """

    def forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        _refuse_reentrant(self)
        self.earlier_inputs.begin(x)
        try:
            plain: Any = kind.forward
            return self.earlier_inputs.end(plain(self, x, *args, **kwargs))
        finally:
            self.earlier_inputs.inputs = None

    def reduce(self: Any) -> tuple[Any, ...]:
        return _empty_block, (kind,), self.__dict__

    members = {"forward": forward, "__reduce__": reduce, "__module__": kind.__module__}
    return type(kind.__name__, (kind,), members)


def _empty_block(kind: Any) -> nn.Module:
    """Return a pre-gated block that is filled by a copy or what ``torch.load`` reads."""
    return object.__new__(_pregated(kind))


def _refuse_reentrant(block: Any) -> None:
    """Refuse checkpointing that loses the gradient of what blocks carry.

    Raises:
        GatesError: Activations of a block of transformers are checkpointed so.
    """
    if block.training and getattr(block, "gradient_checkpointing", False):
        options = getattr(block._gradient_checkpointing_func, "keywords", {})
        if options.get("use_reentrant") is not False:
            raise GatesError(
                "gradients of pre-gates are wrong with re-entrant checkpointing: checkpoint"
                " activations with use_reentrant=False"
            )


def pregate(model: nn.Module, level: int = 1) -> None:
    """Let the gate of each layer of experts read the input of the layer ``level`` before it.

    Experts and weights are then known that many layers early, and experts can be fetched in time
    (*Pre-gated MoE*, arXiv 2308.12066, section 4). They still compute on the input of the layer
    that they are in; the first ``level`` layers are routed as before. Nothing is added and names
    of weights stay; what changes is what the model computes, so it needs fine-tuning. The
    configuration of the model is marked, or the decoder of ours.

    On models of which you write the forward pass, use `core_gates.gates.PreGate`.

    Args:
        model: A mixture model of transformers, such as Mixtral, Qwen3-MoE, OLMoE, DeepSeek-V3 and
            GPT-OSS, or a `language.decoder.Decoder` with experts.
        level: Layers of experts between a decision and its use; dense layers do not count.

    Raises:
        GatesError: The model is no such one or is pre-gated, or has no more than ``level`` layers
            of experts. Later: activations are checkpointed re-entrantly.
    """
    owner: Any = model
    base: Any = getattr(owner, getattr(owner, "base_model_prefix", "model"), owner)
    blocks: Any = base["layers"] if isinstance(base, nn.ModuleDict) else getattr(base, "layers", ())
    routers = [router_of(block) for block in blocks]
    name, count = type(model).__name__, len([router for router in routers if router is not None])
    if not count:
        raise GatesError(
            f"{name} has no layers whose gate chooses experts, one after the other: give a mixture"
            " model such as Mixtral, Qwen3-MoE, OLMoE, DeepSeek-V3 or GPT-OSS"
        )
    if type(level) is not int or not 1 <= level < count:
        raise GatesError(
            f"level is {level!r}, but {name} has {count} layers of experts: give 1 to {count - 1}"
        )
    if any(hasattr(block, "earlier_inputs") for block in blocks):
        raise GatesError(f"{name} is pre-gated already: open the model again")
    before = 0
    for block, router in zip(blocks, routers, strict=True):
        block.earlier_inputs = EarlierInputs(level, before)
        block.__class__ = _pregated(block.__class__)
        if router is not None:
            router.register_forward_pre_hook(block.earlier_inputs.route)
            before += 1
    setattr(getattr(owner, "config", owner), MARK, level)


def router_of(block: nn.Module) -> nn.Module | None:
    """Return the gate of the experts of a block of a model; None for a dense block."""
    for module in block.modules():
        if "experts" in module._modules:
            return next((router for n in ROUTERS if (router := module._modules.get(n))), None)
    return None


def level_of(model: nn.Module) -> int | None:
    """Return the level that a model is marked with; None for a conventional one."""
    return cast(int | None, getattr(getattr(model, "config", model), MARK, None))


def restore_pregates(model: nn.Module) -> None:
    """Pre-gate a model that was just opened if its configuration is marked.

    Raises:
        GatesError: The mark is no level of this model.
    """
    if (level := level_of(model)) is not None:
        pregate(model, level)


def save_pregated(model: Any, folder: Path | str) -> None:
    """Write a pre-gated model of transformers, its configuration marked, with a card.

    `language.hf.pretrained.open_model` and ``load_offloaded`` open it as what it is.

    Args:
        model: After `pregate`.
        folder: Folder that is written, or replaced if it holds such a model alone.

    Raises:
        GatesError: The model is not pre-gated, or the folder holds something else.
    """
    level = level_of(model)
    if level is None:
        raise GatesError(f"{type(model).__name__} is not pre-gated: call pregate(model) before")
    refuse_strangers(Path(folder), MADE)
    with replacing(Path(folder)) as temporary:
        model.save_pretrained(temporary)
        write_text(temporary / MADE[0], CARD.format(level=level, mark=MARK))
