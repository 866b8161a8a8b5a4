"""Attach output gates to the attention of a model of transformers, and take them off again."""

import sys
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from core_gates.activations import GateActivation
from core_gates.attention.head_gate import Form, Granularity, HeadGate, Sharing
from core_gates.errors import GatesError
from language.hf.locate import Attention, locate_attention, refuse_absent, require_attached

CHILD = "output_gate"
"""Name of the gate in the attention module, and so in the state of the model."""


class OutputGate(HeadGate):
    """A gate on the heads of an attention module of transformers, before its output projection.

    A hook on the attention module reads its input, one on the output projection multiplies the
    heads. Both are methods of the gate, so that copies of the model are gated by their own gates.
    Where the projection is replaced later, as PEFT does, the next call moves the hook to the new
    one.

    Args:
        attention: Where it belongs.
        **options: See `HeadGate`.

    Attributes:
        is_kept: Whether it is written with the adapters of PEFT, which know nothing of it.
    """

    def __init__(self, attention: Attention, **options: Any) -> None:
        super().__init__(attention.dim, attention.num_heads, attention.head_dim, **options)
        self.options = {n: value for n, value in options.items() if n not in ("device", "dtype")}
        self.name, self.projection = attention.name, attention.projection
        self.heads = (attention.num_heads, attention.head_dim)
        self.is_kept = False
        self._input: Tensor | None = None
        self._gated: tuple[nn.Module, ...] = ()  # in a tuple, else it would become a child
        self._on_projection: list[Any] = []
        self._on_attention: list[Any] = []

    def hook(self, module: nn.Module) -> None:
        """Become the gate of an attention module."""
        module.add_module(CHILD, self)
        self._on_attention = [
            module.register_forward_pre_hook(self._read, with_kwargs=True),
            module.register_forward_hook(self._check_used),
        ]
        self._hook_projection(getattr(module, self.projection))

    def unhook(self, module: nn.Module) -> None:
        """Undo `hook`."""
        for handle in (*self._on_attention, *self._on_projection):
            handle.remove()
        delattr(module, CHILD)

    def _hook_projection(self, projection: nn.Module) -> None:
        for handle in self._on_projection:
            handle.remove()
        self._on_projection = [projection.register_forward_pre_hook(self._apply_to)]
        self._gated = (projection,)

    def _read(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Keep the input of the attention for the gate.

        Raises:
            GatesError: The gate in the module is another one, such as a copy of PEFT.
        """
        if module._modules.get(CHILD) is not self:
            raise GatesError(
                f"the {CHILD} of {self.name} was replaced by"
                f" {type(module._modules.get(CHILD)).__name__}, which has no hooks: train gates by"
                " requires_grad_(True) and not by modules_to_save"
            )
        projection = getattr(module, self.projection)
        if projection is not self._gated[0]:
            self._hook_projection(projection)
        self._input = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]

    def _apply_to(self, _projection: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """Gate the heads (B, T, H * D) that the projection is called with."""
        x, self._input = self._input, None
        if x is None:  # the projection is called by something else
            return None
        heads, *others = args
        gated = self(x.to(next(self.parameters()).dtype), heads.unflatten(-1, self.heads))
        return (gated.flatten(-2), *others)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        """Warn once where a PeftModel is saved, which leaves out gates, although they are trained.

        Gates in the state of a PeftModel are named after its base; no other model has such names.
        """
        trained = not self.is_kept and any(p.requires_grad for p in self.parameters())
        if trained and prefix.startswith("base_model.model.") and CHILD not in str([*destination]):
            warnings.warn(
                "PEFT saves adapters without the output gates that were trained: give Trainer"
                " callbacks=[GateCallback()], or call save_gates(model, path)",
                stacklevel=2,
            )
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _check_used(self, _module: nn.Module, _args: Any, _output: Any) -> None:
        """Refuse attention whose output projection is not called.

        Raises:
            GatesError: Its weight was used in another way, which no hook sees.
        """
        if self._input is not None:
            self._input = None
            raise GatesError(
                f"{self.name} did not call {self.projection}, so that its gate had no effect:"
                " choose an implementation of attention that calls it"
            )


def attach_output_gate(
    model: nn.Module,
    *,
    granularity: Granularity = "elementwise",
    sharing: Sharing = "head_specific",
    form: Form = "multiplicative",
    activation: GateActivation = "sigmoid",
    bias_init: float | None = 3.0,
    dtype: torch.dtype | None = None,
) -> dict[str, OutputGate]:
    """Put a gate between the heads and the output projection of each attention of a model.

    The heads are multiplied by ``sigmoid(x W + b)`` of the normed input of the layer, position G1
    of *Gated Attention for Large Language Models* (arXiv 2505.06708). The gates are children of
    the attention modules: they are trained, moved and saved with the model. Nothing is frozen; call
    ``model.requires_grad_(False)`` before to train gates alone.

    Args:
        model: A decoder of transformers, see `language.hf.locate.locate_attention`.
        granularity: One gate per feature or one per head.
        sharing: Whether every head has its own gates or all heads share those of one.
        form: Whether the gate multiplies or is added.
        activation: See `HeadGate`.
        bias_init: Bias at the start; 3 opens a sigmoid to 0.95, so that a trained model changes
            little. None: no bias, as published, for a model that is trained from scratch.
        dtype: Of the gates; that of the model if None.

    Returns:
        The gates by the names of their attention modules, such as ``layers.0.self_attn``.

    Raises:
        GatesError: The model does not fit, has such gates already, or weights that are offloaded.
        ValueError: An option is unknown, or ``bias_init`` is not finite.
    """
    attentions = locate_attention(model)
    for attention in attentions:
        child = attention.module._modules.get(CHILD)
        if child is not None:
            raise GatesError(
                f"{attention.name} has output gates already: call detach_output_gate(model) before"
                if isinstance(child, OutputGate)
                else f"{attention.name} ({type(attention.module).__name__}) has an {CHILD} as"
                f" published, a {type(child).__name__}: choose another model"
            )
        refuse_absent(attention.name, attention.module)
    gates = {}
    for attention in attentions:
        place = next(attention.module.parameters())
        gate = OutputGate(
            attention, granularity=granularity, sharing=sharing, form=form, activation=activation,
            bias_init=bias_init, device=place.device, dtype=dtype or _floating(model),
        )  # fmt: skip
        gate.hook(attention.module)
        gates[attention.name] = gate.train(attention.module.training)
    _compile_again()
    return gates


def output_gates(model: nn.Module) -> dict[str, OutputGate]:
    """Return the output gates of a model by the names of their attention modules.

    Raises:
        GatesError: The model has none, or does not fit.
    """
    return require_attached(model, CHILD, OutputGate, "attach_output_gate")


def detach_output_gate(model: nn.Module) -> dict[str, OutputGate]:
    """Take the output gates off a model, which then computes what it did before them, bit for bit.

    Returns:
        The gates by the names of their attention modules.

    Raises:
        GatesError: The model has none.
    """
    gates = output_gates(model)
    for attention in locate_attention(model):
        if attention.name in gates:
            gates[attention.name].unhook(attention.module)
    _compile_again()
    return gates


def _compile_again() -> None:
    """Forget graphs of ``torch.compile``, which do not see that hooks were added or removed."""
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()


def _floating(model: nn.Module) -> torch.dtype:
    """Return the first floating dtype of the parameters of a model."""
    kinds = (p.dtype for p in model.parameters() if p.is_floating_point())
    return next(kinds, torch.get_default_dtype())
