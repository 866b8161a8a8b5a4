"""Scores of trained gates belong to these gates; combinations are drawn by what they share."""

from functools import partial

import numpy as np
import pytest
import torch

from apps.diffusion.studies.fused_views import crossed, refuse_stale
from diffusion.experiments.combined_losses import note_trained
from diffusion.experiments.trained_gates import combinations
from harness.evidence import moments
from harness.experiment import Arrays, Piece, Run
from harness.experiment.store import SettingsDiffer


def scored(piece, job, trained):
    note_trained(job, trained.get(piece.name))
    return {"losses": torch.rand(3, generator=torch.Generator().manual_seed(int(piece["draw"])))}


@pytest.fixture
def asked(tmp_path):
    """``asked(rate, overwrite)``: the score of gates trained at a rate, and whether it was new."""

    def ask(rate, overwrite=False):
        run = Run(tmp_path / "run", app="diffusion", overwrite=overwrite)
        gates = Piece("gates", 0, settings={"learning_rate": rate})
        weights = Run(tmp_path / "world", app="diffusion", overwrite=True).store("gates", Arrays())
        if weights.find(gates) is None:
            weights.keep(gates, {"w": torch.tensor([rate])})
        piece = Piece("gates", 0, settings={"trained": "gates-s0", "draw": 0})
        trained = {piece.name: weights.find(gates)}
        store = run.store("losses", Arrays())
        before = store.find(piece)
        stamp = before and (before / "record.json").stat().st_mtime_ns
        refuse_stale(run, store, {piece: gates})
        run.obtain(store, [piece], partial(scored, trained=trained), scoring=True)
        return stamp != (store.find(piece) / "record.json").stat().st_mtime_ns

    return ask


def test_scores_of_other_weights_are_not_taken(asked):
    assert asked(0.1)
    assert not asked(0.1)
    with pytest.raises(SettingsDiffer, match=r"gates-s0 of other settings .*--overwrite"):
        asked(0.2)
    assert asked(0.2, overwrite=True)
    assert not asked(0.2)


def test_pairs_with_a_subject_or_a_style_in_common_are_drawn_together():
    pairs = combinations("test2")
    draws = crossed(pairs)
    assert draws.units == 16
    styles = sorted({one.styles[0] for one in pairs})
    effects = np.random.default_rng(0).normal(size=len(styles))
    values = np.array([effects[styles.index(one.styles[0])] for one in pairs])
    found = draws.intervals(moments(values))["value"]
    # Two pairs of a style say the same: 24 independent values, not 48.
    assert found.high - found.low > 3.5 * values.std() / np.sqrt(24)


@pytest.mark.parametrize("place", [0, 1, 2])
def test_triples_are_drawn_by_every_adapter_that_they_share(place):
    triples = combinations("test3")
    names = sorted({one.adapters[place] for one in triples})
    effects = np.random.default_rng(0).normal(size=len(names))
    values = np.array([effects[names.index(one.adapters[place])] for one in triples])
    found = crossed(triples).intervals(moments(values))["value"]
    assert found.high - found.low > 3.5 * values.std() / np.sqrt(len(names))
