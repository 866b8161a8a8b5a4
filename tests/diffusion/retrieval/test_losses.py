"""Contrastive losses: closed forms, positives, and two ranks."""

import math

import pytest
import torch
from torch.nn import functional as F

from diffusion.retrieval import AdapterBatch, EncoderConfig, LoraWeightEncoder, collate
from diffusion.retrieval.retriever import ContrastiveLoss, PublishedLoss, positives

DIFFERENT = torch.arange(4)


def pairs(seed=0, count=4, dim=6):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(count, dim, generator=generator, dtype=torch.float64) for _ in range(2)]


def test_without_shared_concepts_it_is_the_mean_of_both_cross_entropies():
    text, lora = pairs()
    loss = ContrastiveLoss(scale=5.0).double()
    logits = 5 * F.normalize(text) @ F.normalize(lora).mT
    own = torch.arange(4)
    expected = (F.cross_entropy(logits, own) + F.cross_entropy(logits.mT, own)) / 2
    found = loss(text, lora, DIFFERENT, DIFFERENT)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
    published = PublishedLoss()(text, lora, DIFFERENT, DIFFERENT)
    logits = logits / 5
    expected = 10 * (F.cross_entropy(logits, own) + F.cross_entropy(logits.mT, own))
    torch.testing.assert_close(published, expected, rtol=1e-6, atol=0)


def test_one_adapter_or_concept_twice_is_no_negative():
    match = positives(torch.tensor([0, 1, 0, 2]), torch.tensor([5, 6, 5, 6]), slice(0, 4))
    assert match.int().tolist() == [[1, 0, 1, 0], [0, 1, 0, 1], [1, 0, 1, 0], [0, 1, 0, 1]]
    text = F.normalize(torch.eye(2, dtype=torch.float64)[[0, 0, 1]])
    loss = ContrastiveLoss(scale=100.0).double()
    numbers, concepts = torch.tensor([0, 1, 2]), torch.tensor([0, 0, 1])
    # Two right ones that are equally near: the floor is the entropy of the target.
    floor = 2 / 3 * math.log(2)
    assert loss(text, text, numbers, concepts).item() == pytest.approx(floor, rel=1e-6)
    assert loss(text, text, numbers, numbers).item() == pytest.approx(floor, rel=1e-6)
    apart = F.normalize(text + 0.3 * torch.eye(3, 2, dtype=torch.float64).flip(0))
    same = loss(apart, apart, numbers, concepts)
    different = loss(apart, apart, numbers, numbers)
    assert same.item() != pytest.approx(different.item(), rel=1e-3)


def test_the_scale_starts_at_its_value_and_stays_below_100():
    loss = ContrastiveLoss()
    assert loss.scale.item() == pytest.approx(1 / 0.07, rel=1e-6)
    with torch.no_grad():
        loss.log_scale.fill_(10.0)
    assert loss.scale.item() == pytest.approx(100)
    loss.limit()
    assert loss.log_scale.item() == pytest.approx(math.log(100))
    with pytest.raises(ValueError, match="scale"):
        ContrastiveLoss(scale=0)


def step(parallel, batch, text, numbers, concepts, weights, settings):
    """The loss and the gradients of one step over all ranks."""
    from torch import distributed as dist
    from torch import nn

    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder = LoraWeightEncoder(EncoderConfig.from_state(settings)).double()
            self.loss = ContrastiveLoss().double()

        def forward(self, batch, text, numbers, concepts):
            return self.loss(text, self.encoder(batch), numbers, concepts)

    both = Both()
    both.load_state_dict(weights)
    wrapped = parallel(both)
    own = parallel.share(torch.arange(len(text)))
    loss = wrapped(AdapterBatch(*batch).rows(own), text[own], numbers[own], concepts[own])
    loss.backward()
    total = loss.detach().clone()
    if dist.is_initialized():
        dist.all_reduce(total)
        total /= dist.get_world_size()
    gradients = {name: p.grad for name, p in both.named_parameters() if p.grad is not None}
    return {"loss": total, **gradients}


def test_two_ranks_see_each_others_negatives(two_ranks, adapter, config):
    torch.manual_seed(0)
    settings = config(missing="mask")
    encoder = LoraWeightEncoder(settings).double()
    weights = {f"encoder.{name}": value for name, value in encoder.state_dict().items()}
    weights["loss.log_scale"] = torch.tensor(2.0, dtype=torch.float64)
    bundles = [adapter(seed, dtype=torch.float64) for seed in range(6)]
    batch = tuple(collate(bundles, encoder.modules_read, torch.float64))
    text = torch.randn(6, 24, dtype=torch.float64)
    numbers, concepts = torch.tensor([0, 1, 2, 3, 1, 5]), torch.tensor([0, 1, 2, 0, 1, 4])
    arguments = (batch, text, numbers, concepts, weights, settings.state())
    found = two_ranks(step, *arguments, tolerance=1e-6)
    assert found["loss.log_scale"].abs() > 1e-6
    assert found["encoder.final_linear.weight"].abs().max() > 1e-4
