"""Definition of ``smooth_step``: any floating dtype, half precision computed in float32."""

from torch import Tensor

from core_gates.numerics import accumulation_dtype


def forward(z: Tensor, gamma: float) -> Tensor:
    """Return 0 for z <= -γ/2, 1 for z >= γ/2 and -2z³/γ³ + 3z/(2γ) + ½ between."""
    place = _place(z, gamma)
    return (place * place * (3 - 2 * place)).to(z.dtype)


def backward(grad: Tensor, z: Tensor, gamma: float) -> Tensor:
    """Return the gradient with respect to ``z``, exactly 0 outside the band."""
    place = _place(z, gamma)
    return (grad.to(place.dtype) * 6 * place * (1 - place) / gamma).to(z.dtype)


def _place(z: Tensor, gamma: float) -> Tensor:
    """Return the place in the band, from 0 to 1; in it the cubic is v² (3 - 2v)."""
    acc = accumulation_dtype(z)
    return ((z.to(acc) + gamma / 2) / gamma).clamp(0, 1)
