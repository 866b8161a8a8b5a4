"""The experts of mixture models of transformers, computed by the ops of the core."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from core_gates.errors import GatesError
from core_gates.moe.dispatch import FlatChoices, combine, plan
from core_gates.ops.grouped_mlp.op import grouped_mlp
from language.hf.locate import require_transformers

NAME = "gates"

LAYOUT = {
    "is_transposed": False,
    "is_concatenated": True,
    "has_bias": False,
    "has_gate": True,
    "has_post_expert_norm": False,  # not all experts have this attribute
}
"""Attributes of experts, each with the only value that `run_experts` computes."""


def register_experts() -> None:
    """Make ``experts_implementation="gates"`` known to transformers, for this process.

    From then on ``from_pretrained(..., experts_implementation="gates")`` and
    ``model.set_experts_implementation("gates")`` let `run_experts` compute the experts of a
    model. Weights keep their names and shapes, and ``config.json`` never holds the name: what is
    saved opens where this package is not installed. A second call changes nothing.

    Raises:
        GatesError: transformers is not installed, or too old.
    """
    require_transformers()
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    ALL_EXPERTS_FUNCTIONS[NAME] = run_experts


def run_experts(
    self: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """Return the outputs of ``self``, the experts of one layer, for the given routing.

    The choices are sorted by expert and none is dropped. The CPU computes float64 as well, and
    float32 under ``torch.compile``, which ``grouped_mm`` of PyTorch does not.

    Args:
        self: Experts ``down_proj(act_fn(gate) * up)`` with the weights ``gate_up_proj``
            (E, 2F, D), the gate first, and ``down_proj`` (E, D, F).
        hidden_states: Tokens (T, D).
        top_k_index: Experts of each token (T, K), int64; E is no expert and adds nothing.
        top_k_weights: Weights of these experts (T, K).

    Returns:
        Weighted sums (T, D) in the dtype of ``hidden_states``.

    Raises:
        GatesError: ``self`` computes something else.
    """
    experts: Any = self
    activation = _checked_activation(experts)
    chosen = FlatChoices(top_k_weights, top_k_index, None)
    order, place, counts = plan(chosen, len(experts.gate_up_proj))
    rows = grouped_mlp(
        hidden_states,
        experts.gate_up_proj,
        experts.down_proj,
        counts,
        activation=activation,
        gated=True,
        gather=torch.div(order, top_k_index.shape[1], rounding_mode="floor"),
    )
    return combine(rows, top_k_weights, place, order).to(hidden_states.dtype)


def _checked_activation(experts: Any) -> str:
    """Return the activation of experts in the words of the core.

    Raises:
        GatesError: The experts are of another layout, or compute another formula.
    """
    from transformers import activations
    from transformers.integrations.moe import _default_apply_gate

    names: dict[Any, str] = {
        F.silu: "silu",
        nn.SiLU: "silu",
        activations.SiLUActivation: "silu",
        activations.GELUActivation: "gelu",
        activations.GELUTanh: "gelu_tanh",
        activations.NewGELUActivation: "gelu_tanh",
        nn.ReLU: "relu",
        activations.LinearActivation: "identity",
    }
    act = experts.act_fn
    kind = act if act in names else type(act)
    layout = {name: getattr(experts, name, wanted) for name, wanted in LAYOUT.items()}
    wrong = [f"{name}={value}" for name, value in layout.items() if value != LAYOUT[name]]
    if type(experts)._apply_gate is not _default_apply_gate:
        wrong.append("an _apply_gate that is not the default one")
    if kind not in names:
        wrong.append(f"act_fn={getattr(act, '__name__', kind.__name__)}")
    if wrong:
        raise GatesError(
            f"{type(experts).__name__} has {', '.join(wrong)}, but {NAME!r} computes"
            " down(act(gate) * up) without biases: set experts_implementation to 'grouped_mm'"
        )
    return names[kind]
