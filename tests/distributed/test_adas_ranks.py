"""Adas trained on two processes against one, through both stages of training."""

import pytest
import torch
from torch import nn

from tests.distributed.lightning_fits import (
    StopAfter,
    fit,
    largest_difference,
    rows_of_rank,
    validation_scores,
)
from weather.grid import gaussian_grid
from weather.models.adas.network import Adas
from weather.observations.gridded import GriddedObservations
from weather.state import SHALLOW_WATER, Normalizer
from weather.training.adas_module import AdasModule
from weather.training.stream import AssimilationBatch, AssimilationDataModule, generator

STEPS, TIMELINES, BLOCK = 8, 4, 4


class Drift(nn.Module):
    """A forecast that mixes neighbors, so that every value depends on the last analysis."""

    def forward(self, states, hours):
        return 0.9 * states.roll(1, -1) + 0.1 * states.roll(-1, -2) + hours / 100


class Source:
    """Random problems in blocks of four cycles."""

    channels, grid = SHALLOW_WATER, gaussian_grid(8, 16)
    background_sd = torch.tensor([0.5, 0.4, 0.3])
    normalizer = Normalizer(torch.tensor([0.1, 0.2, 0.3]), torch.tensor([1.0, 2.0, 3.0]))

    def prepare(self, progress=None):
        pass

    def setup(self):
        pass

    def problem(self, step, timeline, *, validation=False):
        draw = generator(step, timeline, int(validation))
        truth, background, values, unit = torch.randn(4, 3, 8, 16, generator=draw)
        observations = GriddedObservations(truth + values, 0.5 + unit.abs())
        return AssimilationBatch(
            timeline=torch.tensor(timeline),
            reset=torch.tensor(step % BLOCK == 0),
            background=truth + background,
            truth=truth,
            observations=observations.withhold(unit > 0.5),
            background_sd=self.background_sd,
            model=torch.tensor(timeline % 2),
        )


def build_module():
    torch.manual_seed(0)
    network = Adas(
        grid_shape=(8, 16),
        num_surface=3,
        num_upper=0,
        num_levels=0,
        dim=4,
        window_size=(1, 2, 2),
        kernel_sizes=((1, 3, 3), (1, 3, 3), (1, 3, 3)),
        decoder_depth=2,
        drop_path=0.0,
        position="latitude",
        circular_longitude=True,
        output="increment",
    )
    return AdasModule(network, [Drift(), Drift()], learning_rate=1e-2)


def train(stop, folder, resume="", limit_val_batches=0):
    """Train on all processes that there are; return weights, carried states and their rows."""
    module = build_module()
    data = AssimilationDataModule(Source(), STEPS, TIMELINES, 3, 2)
    options = {"precision": "64-true", "limit_val_batches": limit_val_batches}
    stopping = StopAfter(stop, folder)
    trainer = fit(module, data, folder, resume=resume, callbacks=[stopping], **options)
    return {
        "weights": dict(module.analysis.state_dict()),
        "carried": module.carried["train"],
        "rows": rows_of_rank(TIMELINES),
        "steps": trainer.global_step,
        "dtype": str(next(module.parameters()).dtype),
        "val": validation_scores(trainer),
    }


def train_all(folder):
    """Stop after five and after six steps, and continue from the checkpoint of one process."""
    return {
        "five": train(5, f"{folder}/pair5"),
        "six": train(6, f"{folder}/pair6"),
        "resumed": train(0, f"{folder}/pair8", f"{folder}/one6/stopped.ckpt", 1.0),
    }


@pytest.fixture(scope="module")
def results(ranks, tmp_path_factory):
    """All training runs; the processes are started once, for they take longer than their work."""
    folder = tmp_path_factory.mktemp("ranks")
    for name in ("one5", "one6", "one8", "pair5", "pair6", "pair8", "resumed"):
        (folder / name).mkdir()
    one = {
        "five": train(5, folder / "one5"),
        "six": train(6, folder / "one6"),
        "whole": train(0, folder / "one8", "", 1.0),
    }
    pair = ranks(train_all, str(folder))
    checkpoint = str(folder / "pair6" / "stopped.ckpt")
    one["resumed"] = train(0, folder / "resumed", checkpoint)
    saved = {
        name: torch.load(folder / name / "stopped.ckpt", weights_only=True)
        for name in ("one5", "pair5")
    }
    return one, pair, saved


def test_two_ranks_equal_one_process(results):
    """Float64 and AdamW, five steps: four cycles of a block and the first one of the next."""
    one, pair, saved = results
    single, start = one["five"], dict(build_module().double().analysis.state_dict())
    assert single["dtype"] == "torch.float64"
    assert largest_difference(single["weights"], start) > 1e-3  # they did learn
    for result in (of_rank["five"] for of_rank in pair):
        assert result["steps"] == 5
        assert largest_difference(result["weights"], single["weights"]) <= 1e-10
        rows = result["rows"]
        assert (result["carried"][rows] - single["carried"][rows]).abs().max() <= 1e-10
        others = [row for row in range(TIMELINES) if row not in rows]
        assert (result["carried"][others] == 0).all()  # a rank holds its own
    left, right = saved["one5"], saved["pair5"]
    assert largest_difference(left["state_dict"], right["state_dict"]) <= 1e-10
    assert right["carried"].shape == (TIMELINES, 3, 8, 16)
    assert right["carried"].abs().amax((1, 2, 3)).min() > 0.1
    assert (left["carried"] - right["carried"]).abs().max() <= 1e-10


def test_a_checkpoint_of_two_ranks_resumes_on_one(results):
    """Stopped inside a block: the next background is the forecast from a carried analysis."""
    one, pair, _ = results
    assert [of_rank["six"]["steps"] for of_rank in pair] == [6, 6]
    resumed, whole = one["resumed"], one["whole"]
    assert resumed["steps"] == whole["steps"] == STEPS
    assert largest_difference(one["six"]["weights"], whole["weights"]) > 1e-4
    assert largest_difference(resumed["weights"], whole["weights"]) <= 1e-10
    assert (resumed["carried"] - whole["carried"]).abs().max() <= 1e-10


def test_a_checkpoint_of_one_process_resumes_on_two(results):
    one, pair, _ = results
    whole = one["whole"]
    for result in (of_rank["resumed"] for of_rank in pair):
        assert result["steps"] == STEPS
        assert largest_difference(result["weights"], whole["weights"]) <= 1e-10
        rows = result["rows"]
        assert (result["carried"][rows] - whole["carried"][rows]).abs().max() <= 1e-10
        assert result["val"] == pytest.approx(whole["val"], rel=1e-6)  # the mean of both ranks
    assert {"val/score", "val/lost", "val/rmse_h"} <= whole["val"].keys()
