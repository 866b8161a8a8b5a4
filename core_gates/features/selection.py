"""Feature-selection and hard-attention gates (arXiv 2407.04400), and their folding."""

from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from core_gates.errors import check_at_least, check_option
from core_gates.features.low_rank import HARD_CONCRETE, Rectifier, rectify
from core_gates.numerics import accumulation_dtype

Side = Literal["output", "input"]
_NORMS = (
    nn.LayerNorm,
    nn.RMSNorm,
    nn.GroupNorm,
    nn.BatchNorm1d,
    nn.BatchNorm2d,
    nn.BatchNorm3d,
)


@torch.no_grad()
def scale_outputs(module: nn.Module, scores: Tensor) -> None:
    """Multiply the output features of a module by ``scores``.

    Args:
        module: Linear layer, convolution or affine normalization; changed in place.
        scores: Factor of each output feature.

    Raises:
        ValueError: The module is of another kind, has no affine weights or other features.
    """
    kinds = nn.Linear, _ConvNd, *_NORMS
    weight = _weight(module, kinds)
    if weight.shape[0] != scores.shape[0]:
        raise ValueError(f"{_name(module)} has {weight.shape[0]} outputs, not {scores.shape[0]}")
    weight.mul_(scores.to(weight.dtype).view(-1, *[1] * (weight.ndim - 1)))
    bias = getattr(module, "bias", None)
    if isinstance(bias, Tensor):
        bias.mul_(scores.to(bias.dtype))


@torch.no_grad()
def scale_inputs(module: nn.Module, scores: Tensor) -> None:
    """Multiply the input features of a module by ``scores``, as if they came scaled.

    Args:
        module: Linear layer or convolution without groups; changed in place.
        scores: Factor of each input feature.

    Raises:
        ValueError: The module is of another kind, is grouped or has other features.
    """
    weight = _weight(module, (nn.Linear, _ConvNd))
    if isinstance(module, _ConvNd) and module.groups != 1:
        raise ValueError(f"{_name(module)} has {module.groups} groups; only 1 can absorb scores")
    if weight.shape[1] != scores.shape[0]:
        raise ValueError(f"{_name(module)} has {weight.shape[1]} inputs, not {scores.shape[0]}")
    weight.mul_(scores.to(weight.dtype).view(1, -1, *[1] * (weight.ndim - 2)))


def _weight(module: nn.Module, kinds: tuple[type[nn.Module], ...]) -> Tensor:
    weight = getattr(module, "weight", None)
    fits = isinstance(module, kinds) and not isinstance(module, _ConvTransposeNd)
    if not fits or not isinstance(weight, Tensor):
        raise ValueError(
            f"{_name(module)} cannot absorb scores; expected a module with weights that is a"
            f" {', '.join(kind.__name__.strip('_') for kind in kinds)}"
        )
    return weight


def _name(module: nn.Module) -> str:
    return type(module).__name__


class FeatureSelectionGate(nn.Module):
    """Scale every feature by a learned score, the same at all positions (arXiv 2407.04400).

    ``y = s(g) * x`` with one logit g a feature. The scores do not depend on the input, so that a
    trained gate folds into the layer before or after it. They become exactly zero for the
    rectifiers other than the sigmoid of the paper:

    - ``sigmoid``: s = σ(g), near 0.5 at the start;
    - ``relu``: s = max(g, 0); a gate that is closed gets no gradient, so start it open, e.g. at 1;
    - ``hard_concrete``: s = clip(1.2 σ(g) - 0.1, 0, 1), in training a random sample with the same
      mean logit, one a forward pass (Louizos et al., 2018); drive it by `l0_penalty`, and
      before evaluation measure the statistics of batch normalization again, which the noise has
      spread: ``core_gates.training.recalibrate_batch_norm``;
    - ``straight_through``: s = 1 where σ(g) > 0.5, else 0, with the gradient of σ(g).

    Args:
        dim: Number of features.
        rectifier: One of the four above.
        init: ``xavier`` draws the logits from N(0, 2 / (1 + dim)), ``he`` from N(0, 2 / dim); a
            number is the logit of all.
        feature_dim: Dimension of the features: -1 for tokens, 1 for images (B, C, H, W).
        device: Device of the logits.
        dtype: Floating dtype of the logits; the scores are computed in float32 at least.

    Shape:
        ``x`` and the result (..., dim, ...), any floating dtype.

    Raises:
        ValueError: ``dim`` is below 1, or rectifier or init is unknown.
    """

    kept: Tensor

    def __init__(
        self,
        dim: int,
        *,
        rectifier: Rectifier = "sigmoid",
        init: Literal["xavier", "he"] | float = "xavier",
        feature_dim: int = -1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_at_least(1, dim=dim)
        check_option("rectifier", rectifier, get_args(Rectifier))
        if isinstance(init, str) and init not in ("xavier", "he"):
            raise ValueError(f"init is {init!r}; choose xavier, he or a number")
        self.dim = dim
        self.rectifier: Rectifier = rectifier
        self.init = init
        self.feature_dim = feature_dim
        self.logits = nn.Parameter(torch.empty(dim, device=device, dtype=dtype))
        self.register_buffer("kept", torch.empty(dim, device=device, dtype=torch.bool))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the logits according to ``init`` and keep every feature."""
        if isinstance(self.init, str):
            fan = self.dim + 1 if self.init == "xavier" else self.dim
            nn.init.normal_(self.logits, std=(2 / fan) ** 0.5)
        else:
            nn.init.constant_(self.logits, self.init)
        self.kept.fill_(True)

    def scores(self) -> Tensor:
        """Return the scores (dim,) of evaluation, without noise, zero where pruned."""
        return torch.where(self.kept, rectify(self._exact_logits(), self.rectifier), 0)

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x`` scaled by the scores, in the dtype of ``x``.

        Raises:
            ValueError: ``x`` has another number of features.
        """
        if x.shape[self.feature_dim] != self.dim:
            raise ValueError(
                f"x {tuple(x.shape)} must have {self.dim} features in dimension {self.feature_dim}"
            )
        shape = [1] * x.ndim
        shape[self.feature_dim] = self.dim
        return x * self._drawn_scores().to(x.dtype).view(shape)

    def gate_values(self, x: Tensor) -> Tensor:  # noqa: ARG002
        """Return the scores (dim,), whatever the input; those of a ReLU may exceed one."""
        return self.scores()

    def l0_penalty(self) -> Tensor:
        """Return the expected number of open gates, to be weighed and added to the loss.

        Raises:
            ValueError: The rectifier never closes a gate (sigmoid), or not by chance (ReLU).
        """
        logits = self._exact_logits()
        if self.rectifier == "hard_concrete":
            probability = HARD_CONCRETE.open_probability(logits)
        elif self.rectifier == "straight_through":
            probability = logits.sigmoid()
        else:
            raise ValueError(
                f"an L0 penalty needs gates that close at random, not rectifier {self.rectifier!r};"
                " choose hard_concrete or straight_through"
            )
        return torch.where(self.kept, probability, 0).sum()

    @torch.no_grad()
    def prune_(self, threshold: float = 0.0) -> int:
        """Close for good the gates whose score is at most ``threshold``; return how many remain."""
        self.kept &= self.scores() > threshold
        return int(self.kept.sum())

    @torch.no_grad()
    def fold_into(self, module: nn.Module, side: Side) -> None:
        """Multiply the scores of evaluation into the weights of a neighbor, in place.

        Args:
            module: Linear layer, convolution or affine normalization.
            side: ``output`` if the gate follows the module, ``input`` if it precedes it.

        Raises:
            ValueError: The module cannot absorb the scores, or the side is unknown.
        """
        check_option("side", side, get_args(Side))
        (scale_outputs if side == "output" else scale_inputs)(module, self.scores())

    def extra_repr(self) -> str:
        """Show the settings in ``print(gate)``."""
        return f"dim={self.dim}, rectifier={self.rectifier}, feature_dim={self.feature_dim}"

    def _exact_logits(self) -> Tensor:
        return self.logits.to(accumulation_dtype(self.logits))

    def _drawn_scores(self) -> Tensor:
        if self.rectifier != "hard_concrete" or not self.training:
            return self.scores()
        logits = self._exact_logits()
        smallest = torch.finfo(logits.dtype).eps  # the logarithms of the noise stay finite
        uniform = torch.rand_like(logits).clamp(smallest, 1 - smallest)
        return torch.where(self.kept, HARD_CONCRETE.sample(logits, uniform), 0)


HardAttentionGate = FeatureSelectionGate
