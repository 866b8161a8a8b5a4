"""The linear denoiser: closed forms, and no linear prediction is better."""

import pytest
import torch
from torch.testing import assert_close

from core_gates.errors import GatesError
from diffusion.evaluation.fusion_losses import SHRINKAGE, LinearDenoiser


def normal(count, seed, *, size=6):
    draw = torch.Generator().manual_seed(seed)
    mix = torch.randn(size, size, generator=torch.Generator().manual_seed(99)).double()
    rows = torch.randn(count, size, generator=draw).double() @ mix.mT / 2 + 1.5
    return rows.view(count, 1, 2, 3)


def test_independent_latents_have_a_closed_form():
    mean, variance, t = torch.full((6,), 0.7).double(), 0.25, 0.4
    found = LinearDenoiser(mean, variance * torch.eye(6).double())
    x = normal(5, 0)
    r = (x - (1 - t) * 0.7) / ((1 - t) ** 2 * variance + t**2)
    assert_close(found.velocity(x, t), t * r - 0.7 - (1 - t) * variance * r)
    assert_close(found.velocity(x, 1.0), x - 0.7)  # pure noise: less the mean image


@pytest.mark.parametrize("t", [0.1, 0.5, 0.9])
def test_it_is_the_regression_of_velocities(t):
    z = normal(40_000, 1)
    noise = torch.randn(z.shape, generator=torch.Generator().manual_seed(2)).double()
    x, wanted = (1 - t) * z + t * noise, noise - z
    found = LinearDenoiser.of(z).velocity(x, t)
    design = torch.cat([x.flatten(1), torch.ones(len(x), 1).double()], 1)
    fit = design @ torch.linalg.lstsq(design, wanted.flatten(1)).solution
    best = (fit - wanted.flatten(1)).square().mean()
    own = (found - wanted).square().mean()
    assert best <= own < best * (1 + 5 * SHRINKAGE)
    assert own < 0.9 * wanted.var()


def test_one_latent_has_no_covariance():
    with pytest.raises(GatesError, match="two latents"):
        LinearDenoiser.of(normal(1, 0))
