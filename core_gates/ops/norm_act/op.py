"""The public function ``norm_act``."""

from torch import Tensor

from core_gates.activations import check_activation
from core_gates.ops._select import definition
from core_gates.ops.norm_act import reference


def norm_act(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor | None = None,
    variance: Tensor | None = None,
    *,
    activation: str = "silu",
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor, Tensor]:
    """Normalize every channel of every expert, then apply an activation.

    ``act((x - mean) / sqrt(variance + eps) * weight + bias)``: the seam of two layers of experts
    with batch normalization, bound by memory. The backward pass recomputes the normalized values.

    Args:
        x: Rows of every expert (E, N, C).
        weight: Factor of every channel (E, C).
        bias: Summand of every channel (E, C).
        mean: Mean of every channel (E, C), as in evaluation; that of the N rows if None.
        variance: Variance of every channel (E, C); that of the N rows, biased, if None.
        activation: ``silu``, ``gelu``, ``gelu_tanh``, ``relu`` or ``identity``.
        eps: Added to the variance.

    Returns:
        The result (E, N, C) in the dtype of ``x``, and mean and variance (E, C) that were used, in
        float32 at least; those of the batch carry no gradient.

    Raises:
        ValueError: The shapes do not fit, only one of mean and variance is given, there is no row
            to take them of, or the activation is unknown.
    """
    _check(x, weight, bias, mean, variance)
    check_activation(activation)
    by_batch = mean is None or variance is None
    statistics = (weight, weight) if mean is None or variance is None else (mean, variance)
    return definition(reference.forward)(
        x, weight, bias, *statistics, activation, float(eps), by_batch
    )


def _check(
    x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor | None, variance: Tensor | None
) -> None:
    if x.ndim != 3:
        raise ValueError(f"x {tuple(x.shape)} must be (experts, rows, channels)")
    if (mean is None) != (variance is None):
        raise ValueError("mean and variance belong together; one of them is missing")
    shape = (x.shape[0], x.shape[2])
    named = {"weight": weight, "bias": bias, "mean": mean, "variance": variance}
    for name, tensor in named.items():
        if tensor is not None and tensor.shape != shape:
            raise ValueError(f"{name} {tuple(tensor.shape)} must have the shape {shape}")
    if mean is None and x.shape[1] == 0:
        raise ValueError("there is no row whose mean and variance could be taken")
