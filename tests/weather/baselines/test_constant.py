import torch

from weather.baselines.assimilator import Climatology, FreeRun, Persistence


def test_what_they_return(problem):
    background, observations = problem(timelines=2)
    mean = torch.rand(2, 6, 12)
    climatology = Climatology(mean).analyse(background, observations)
    assert torch.equal(climatology, torch.stack([mean, mean])[:, None].to(background))
    persistence = Persistence()
    assert torch.equal(persistence.analyse(background, observations), background)
    assert torch.equal(persistence.analyse(background + 1, observations), background)
    assert torch.equal(FreeRun().analyse(background, observations), background)


def test_results_are_free_to_be_changed(problem):
    background, observations = problem(timelines=2)
    kept = background.clone()
    mean = torch.zeros(2, 6, 12, dtype=torch.float64)
    persistence = Persistence()
    for method in (FreeRun(), Climatology(mean), persistence, persistence):
        method.analyse(background, observations)[0] = 1.0
    assert torch.equal(background, kept)
    assert torch.equal(persistence.analyse(background, observations), kept)
    assert not mean.any()
