"""Rivals that are fitted on the very pair: on which drawings, how well, and what a kill costs."""

from types import SimpleNamespace

import pytest
import torch
from torch.testing import assert_close

import apps.diffusion.studies.fused_views as study
import diffusion.experiments.combined_losses as works
from core_gates.errors import GatesError
from diffusion.experiments.trained_gates import Bench
from harness.experiment import Arrays, Job, Piece, Run

SMALL = {
    "lora_hub": {"drawings": 2, "times": 2, "evaluations": 8, "regularization": 0.05},
    "zip_lora": {"drawings": 2, "draws": 4, "steps": 8, "batch_size": 4, "learning_rate": 0.05},
}
ASKED = {"group": "test2", "part": "test", "times": 2, "most": 2}


@pytest.fixture
def places(zoo_root, write):
    world = write.world_of(zoo_root)
    return {"base_folder": world.base_folder, "files": world.zoo(0)}


@pytest.fixture
def made(places, tmp_path, monkeypatch):
    """``made(rival, **settings)``: the work on two pairs."""
    every = works.combinations
    monkeypatch.setattr(works, "combinations", lambda group: every(group)[:2])
    number = iter(range(99))

    def make(rival, part="test", folder=None, tick=lambda: None, **changes):
        folder = folder or tmp_path / f"job{next(number)}"
        folder.mkdir(exist_ok=True)
        given = {"rival": rival, "settings": SMALL.get(rival, {}) | changes, **ASKED, "part": part}
        piece = Piece(rival, None, {}, given)
        if rival in SMALL:
            return works.seen_losses(piece, Job(folder, tick), form=Arrays(), **places)
        return works.losses(piece, Job(folder, tick), trained={}, **places)

    return make


def test_lorahub_is_never_worse_than_its_start(made):
    found = made("lora_hub", regularization=0.0, evaluations=14)
    assert (found["after"] < found["before"]).all()  # random adapters help a little, either way
    assert (found["factors"] != 0).any(1).all()
    assert (found["factors"].abs() <= 1.5).all()
    weighed = made("lora_hub")
    assert (weighed["after"] <= weighed["before"]).all()
    first = made("lora_hub", evaluations=1)
    assert_close(first["after"], first["before"])
    assert (first["factors"] == 0).all()
    # without adapters it is the base, on the noise that the base is measured by
    assert_close(first["losses"], made("none")["losses"])


def test_ziplora_learns_something_else_than_the_sum(made):
    found, summed = made("zip_lora"), made("sum")["losses"]
    assert (found["after"] < 0.98 * found["before"]).all()
    assert ((found["losses"] - summed).abs() > 1e-4).all()
    still = made("zip_lora", learning_rate=0.0)
    assert_close(still["after"], still["before"])
    assert_close(still["factors"], torch.ones(2, 2))
    assert_close(still["losses"], summed)  # on the noise that the sum is measured by


@pytest.mark.parametrize("rival", SMALL)
def test_drawings_of_the_test_are_not_seen(made, monkeypatch, rival):
    found, tasks = made(rival), Bench.tasks
    spoiled = {"test"}

    def spoil(self, group, part, most):
        made = tasks(self, group, part, most)
        for task in made:
            if part in spoiled:
                task.latents.fill_(torch.nan)
        return made

    monkeypatch.setattr(Bench, "tasks", spoil)
    blind = made(rival)
    assert blind["losses"].isnan().all()
    for name in ("before", "after", "factors"):
        assert torch.equal(blind[name], found[name])
    spoiled.add("gate")
    with pytest.raises(GatesError, match="nan"):
        made(rival)


@pytest.mark.parametrize("rival", SMALL)
def test_a_kill_costs_one_pair(made, monkeypatch, tmp_path, rival):
    whole = made(rival)
    fit, fitted = works.FITS[rival], []

    def counted(bench, adapters, shown, pair, settings):
        fitted.append(pair.name)
        return fit(bench, adapters, shown, pair, settings)

    def killed():
        raise KeyboardInterrupt

    monkeypatch.setitem(works.FITS, rival, counted)
    with pytest.raises(KeyboardInterrupt):
        made(rival, folder=tmp_path / "killed", tick=killed)
    assert len(fitted) == 1
    ticks = []
    resumed = made(rival, folder=tmp_path / "killed", tick=lambda: ticks.append(1))
    assert len(ticks) == 2
    assert len(set(fitted)) == len(fitted) == 2
    for name, value in whole.items():
        assert_close(resumed[name], value, rtol=0, atol=0, equal_nan=True)


def test_a_quick_run_fits_nothing(tmp_path):
    run = Run(tmp_path / "fusion", app="diffusion", quick=True)

    def piece(method, group, seed):
        assert (group, seed) == ("test2", None)
        return run.piece(method.name, seed, rival=method.rival, settings=method.settings)

    compared = SimpleNamespace(run=run, places={}, piece=piece)
    assert study.losses_of_seeing(compared) == {}
    assert not list(run.folder.rglob("result.*"))


def test_methods_say_what_they_see():
    assert list(study.SEEING) == ["lorahub (sees the pair)", "ziplora (sees the pair)"]
    assert set(study.SEEING.values()) == set(works.FITTING) == set(works.FITS)
