"""Which of several adapters is the subject: ridge regression on what their weights look like."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence

from diffusion.lora_file import Factors, LoraBundle

DECISION = "decision"  # name of the intercept and the margin, next to names of layers


class RoleOrder:
    """Scores adapters by their weights: high for subjects, low for styles.

    Features are ``log ‖ΔW‖`` of each layer less their mean over the layers of the adapter, so that
    rescaling an adapter changes nothing, and ratios of singular values, see `described`. What
    an adapter lacks counts as the mean of the adapters that this was fitted to.

    Args:
        tensors: All that was learned, see `fit_order`.

    Attributes:
        layers: Names of the L layers.
        mean: Of the features (L, 2).
        weights: Of the features (L, 2).
        intercept: Score of an adapter like the mean.
        margin: Difference of scores up to which it is not known which adapter is the subject.
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.layers = [name for name in tensors if name != DECISION]
        self.mean, self.weights = torch.stack([tensors[name] for name in self.layers], 1)
        self.intercept, self.margin = tensors[DECISION].tolist()

    def scores(self, bundles: Sequence[LoraBundle]) -> tuple[Tensor, Tensor]:
        """Return subject − style (N,), and which fraction of the features each adapter has (N,)."""
        features = torch.stack([described(bundle, self.layers) for bundle in bundles])
        seen = features.isfinite().double().mean((1, 2))
        return _scores(features, self.mean, self.weights, self.intercept), seen

    def ranked(self, bundles: Mapping[str, LoraBundle]) -> list[str] | None:
        """Return the names of adapters, the subject first; None where weights do not decide.

        The best score has to be above 0, the next below it, and both apart by more than the margin
        over the fraction of the features that are there: the less is seen, the clearer it has to
        be.

        Args:
            bundles: Name -> adapter, one or more.
        """
        scores, seen = self.scores(list(bundles.values()))
        best, places = scores.sort(descending=True)
        if len(best) > 1:
            apart = (best[0] - best[1]) * seen.min() > self.margin
            if not (apart and best[0] > 0 > best[1]):
                return None
        return [list(bundles)[place] for place in places]

    def verdicts(
        self, subjects: Sequence[LoraBundle], styles: Sequence[LoraBundle]
    ) -> dict[str, float]:
        """Return the fractions of pairs that are ``right``, ``wrong``, and ``asked`` (not decided).

        Args:
            subjects: Adapters of subjects.
            styles: Adapters of styles; each makes a pair with each subject.
        """
        (high, of_high), (low, others) = self.scores(subjects), self.scores(styles)
        gaps = (high[:, None] - low) * torch.minimum(of_high[:, None], others)
        high, low = high[:, None] > 0, low > 0
        right, wrong = (gaps > self.margin) & high & ~low, (gaps < -self.margin) & ~high & low
        shares = {"right": right, "asked": ~(right | wrong), "wrong": wrong}
        return {name: float(share.double().mean()) for name, share in shares.items()}


def described(bundle: LoraBundle, layers: Sequence[str]) -> Tensor:
    """Return ``log ‖ΔW‖`` and the second singular value over the first (L, 2), in float64.

    QR decompositions of both factors leave a core of r × r numbers with the singular values of ΔW,
    which is never formed. For DoRA it is about the direction.

    Args:
        bundle: An adapter.
        layers: Names of L layers.

    Returns:
        NaN for layers that the adapter lacks, leaves as they are or fills with numbers that are not
        finite; in the second column also for those of rank 1.
    """
    return _features(_spectra(bundle, layers))


def fit_order(
    subjects: Sequence[LoraBundle],
    styles: Sequence[LoraBundle],
    *,
    ridge: float = 0.3,
    quantile: float = 0.01,
    copies: int = 12,
) -> dict[str, Tensor]:
    """Return the ridge regression to 1 for subjects and −1 for styles, in closed form.

    It is fitted to every adapter as it is, and to copies of it that are like adapters of other
    training runs: cut to 1 to all of its ranks, with a random fraction of its layers, half of them
    to all. The copies are drawn with a fixed seed, so that equal adapters give equal results.

    The margin is half of a quantile of the differences of leave-one-out scores, over all pairs of a
    subject and a style, and not below the largest difference of a pair in the wrong order. An
    adapter is left out together with its copies, and scored as it is.

    Args:
        subjects: Two or more adapters.
        styles: Two or more adapters.
        ridge: Penalty, for features of variance 1 whose products are averaged, of the mean over an
            adapter and its copies.
        quantile: Fraction of the pairs, left out of the fit, whose difference may be smaller.
        copies: Of each adapter; 0 or more.

    Returns:
        Layer -> means and weights of its features (2, 2); ``decision`` -> intercept and margin.
    """
    bundles, first = [*subjects, *styles], len(subjects)
    layers = sorted({name for bundle in bundles for name in bundle.modules})
    draw = torch.Generator().manual_seed(0)
    features = torch.stack(
        [_with_copies(_spectra(bundle, layers), copies, draw) for bundle in bundles]
    )
    wanted = torch.where(torch.arange(len(bundles)) < first, 1.0, -1.0).double()
    others = ~torch.eye(len(bundles), dtype=torch.bool)
    left = torch.stack([
        _scores(row, *_ridge(features[rest], wanted[rest], ridge))
        for row, rest in zip(features[:, 0], others, strict=True)
    ])  # fmt: skip
    gaps = left[:first, None] - left[first:]
    mean, weights, intercept = _ridge(features, wanted, ridge)
    margin = max(gaps.quantile(quantile) / 2, -gaps.min())
    features = torch.stack([mean, weights], 1)
    return {**dict(zip(layers, features, strict=True)), DECISION: torch.stack([intercept, margin])}


def _spectra(bundle: LoraBundle, layers: Sequence[str]) -> Tensor:
    """Return the singular values of ΔW (L, R), the largest first; NaN beyond the rank of a layer.

    R is the largest rank; layers that the adapter lacks are NaN.
    """
    spectra = [_singular_values(bundle.modules.get(name)) for name in layers]
    return pad_sequence(spectra, batch_first=True, padding_value=torch.nan)


def _singular_values(factors: Factors | None) -> Tensor:
    """Return those of ΔW, the largest first; one NaN where there is no ΔW."""
    if factors is None:
        return torch.full((1,), torch.nan, dtype=torch.float64)
    left, right = (
        torch.linalg.qr(factor.double(), "r").R for factor in (factors.up, factors.down.T)
    )
    return torch.linalg.svdvals((factors.scale * left @ right.T).nan_to_num(0.0, 0.0, 0.0))


def _features(values: Tensor) -> Tensor:
    """Return what `described` does (L, 2) of singular values (L, R)."""
    first, second = pad(values, (0, 1), value=torch.nan).T[:2]
    features = torch.stack([values.square().nansum(1).sqrt().log(), second / first], 1)
    return features.where(features.isfinite(), torch.nan)


def _with_copies(values: Tensor, copies: int, draw: torch.Generator) -> Tensor:
    """Return features of an adapter (1 + copies, L, 2), as it is and of copies that show less."""
    copied = [_features(values)]
    for _ in range(copies):
        rank = int(torch.randint(1, values.shape[1] + 1, (), generator=draw))
        shown = (0.5 + 0.5 * torch.rand((), generator=draw)) > torch.rand(
            len(values), 1, generator=draw
        )
        copied.append(_features(values[:, :rank].where(shown, torch.nan)))
    return torch.stack(copied)


def _ridge(found: Tensor, wanted: Tensor, ridge: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return means and weights (L, 2) of features (N, C, L, 2) of N adapters, and the intercept."""
    ridge, wanted = ridge * found.shape[1], wanted.repeat_interleave(found.shape[1])
    found = found.flatten(0, 1)
    mean = _centered(found, torch.zeros(())).nanmean(0).nan_to_num()
    centered = _centered(found, mean)
    spread = centered.square().nanmean(0).sqrt().nan_to_num().clamp_min(1e-9) * mean.numel() ** 0.5
    features = (centered / spread).nan_to_num().flatten(1)
    weights = features.T @ torch.linalg.solve(
        features @ features.T + ridge * torch.eye(len(found)), wanted - wanted.mean()
    )
    return mean, weights.view_as(mean) / spread, wanted.mean()


def _scores(features: Tensor, mean: Tensor, weights: Tensor, intercept: Tensor | float) -> Tensor:
    return intercept + (_centered(features, mean) * weights).nansum((-2, -1))


def _centered(features: Tensor, mean: Tensor) -> Tensor:
    """Return features (..., L, 2) less their mean, and norms less what is left of their level."""
    rest = features - mean
    return rest - rest.nanmean(-2, keepdim=True) * torch.tensor([1.0, 0.0])
