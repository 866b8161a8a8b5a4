"""The public function ``feature_gate``."""

from collections.abc import Sequence

from torch import Tensor

from core_gates.ops._select import definition
from core_gates.ops.feature_gate import reference


def feature_gate(
    v: Tensor,
    hidden: Tensor,
    mixture: Tensor,
    up: Tensor,
    inputs: Sequence[int],
    gates: Sequence[int],
) -> Tensor:
    """Multiply inputs by the factors of low-rank feature gates (HoME, arXiv 2408.05430).

    Run j is ``v_i * Σ_l mixture_jl 2σ(hidden_jl up_gl)`` for its input ``i = inputs[j]`` and its
    gate ``g = gates[j]``. As the mixture sums to one, the factor is ``1 + Σ_l mixture_jl
    (2σ(·) - 1)``, the form used here: with ``up = 0`` it is exactly one. The logits, L times the
    size of the result, are computed again in the backward pass.

    Args:
        v: Inputs (I, N, D).
        hidden: Low-rank activations of the runs (R, N, L, r).
        mixture: Weights of the maps of every run (R, N, L).
        up: Second factors of the maps of all gates (G, L, r, D).
        inputs: Input of every run (R,).
        gates: Gate of every run (R,).

    Returns:
        The rescaled inputs (R, N, D) in the dtype of ``v``; half precision is computed in float32.

    Raises:
        ValueError: The shapes do not fit, or a run names an input or a gate that does not exist.
    """
    _check(v, hidden, mixture, up, inputs, gates)
    return definition(reference.forward)(v, hidden, mixture, up, list(inputs), list(gates))


def _check(
    v: Tensor,
    hidden: Tensor,
    mixture: Tensor,
    up: Tensor,
    inputs: Sequence[int],
    gates: Sequence[int],
) -> None:
    if v.ndim != 3 or up.ndim != 4 or v.shape[2] != up.shape[3]:
        raise ValueError(
            f"v {tuple(v.shape)} must be (inputs, rows, features) and up {tuple(up.shape)} (gates,"
            " maps, rank, features) of the same features"
        )
    shape = (len(gates), v.shape[1], up.shape[1])
    if mixture.shape != shape or hidden.shape != (*shape, up.shape[2]):
        raise ValueError(
            f"mixture {tuple(mixture.shape)} must be {shape}, (runs, rows, maps), and hidden"
            f" {tuple(hidden.shape)} have {up.shape[2]} activations for each map"
        )
    for name, found, number in (("inputs", inputs, len(v)), ("gates", gates, len(up))):
        if len(found) != shape[0] or not all(0 <= i < number for i in found):
            raise ValueError(
                f"{name} {list(found)} must name one of {number} for each of {shape[0]} runs"
            )
