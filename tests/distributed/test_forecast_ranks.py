"""FengWu trained on two processes against one, from the data and from the replay buffer."""

import pytest
import torch

from tests.distributed import lightning_fits
from tests.distributed.lightning_fits import largest_difference, rows_of_rank
from weather.grid import gaussian_grid
from weather.models.fengwu.network import fengwu_preset
from weather.state import SHALLOW_WATER, Normalizer
from weather.training.forecast_module import FengWuModule
from weather.training.stream import ForecastBatch, ForecastDataModule, generator

STEPS, ROWS, TIMES = 8, 4, 30
TOLERANCE = 1e-6  # states in the buffer are float32


class Source:
    """A pattern that turns and fades."""

    channels, grid, step_hours, seed = SHALLOW_WATER, gaussian_grid(8, 16), 6.0, 0
    normalizer = Normalizer(torch.tensor([0.1, 0.2, 0.3]), torch.tensor([1.0, 2.0, 3.0]))
    increment_sd = torch.tensor([0.5, 1.0, 1.5])

    def prepare(self, progress=None):
        pass

    def setup(self):
        pass

    def num_times(self, *, validation=False):
        return TIMES

    def state(self, member, time, *, validation=False):
        pattern = torch.randn(3, 8, 16, generator=generator(member, int(validation)))
        return 0.98**time * pattern.roll(time, -1)

    def problem(self, step, timeline, *, validation=False):
        time = 1 + step
        numbers = (torch.tensor(value) for value in (step, timeline, timeline, time))
        frames = (self.state(timeline, time + k, validation=validation) for k in (-1, 0, 1))
        return ForecastBatch(*numbers, *frames)


class StopAfter(lightning_fits.StopAfter):
    """Counts the rows that came from the buffer, too."""

    def setup(self, trainer, module, stage):
        self.leads, original = [], module.start

        def start(batch):
            found = original(batch)
            self.leads.append(found.leads)
            return found

        module.start = start


def build_module():
    torch.manual_seed(0)
    options = {"grid_shape": (8, 16), "dim": 4, "window_size": (2, 2), "depths": (1, 1)}
    network = fengwu_preset("unit", fuser_depth=1, **options)
    return FengWuModule(network, learning_rate=1e-2, replay=0.7, slots=2, max_lead=3)


def train(stop, folder, resume=""):
    """Train on all processes that there are; return weights, buffer and its rows."""
    module, stopping = build_module(), StopAfter(stop, folder)
    data = ForecastDataModule(Source(), STEPS, ROWS, 1, 2)
    options = {"precision": "64-true", "limit_val_batches": 0, "num_sanity_val_steps": None}
    lightning_fits.fit(module, data, folder, resume=resume, callbacks=[stopping], **options)
    return {
        "weights": dict(module.forecast.state_dict()),
        "buffer": module.buffer.state_dict(),
        "rows": rows_of_rank(ROWS),
        "leads": stopping.leads,
    }


def train_all(folder):
    """Stop after five steps, and continue from the checkpoint of one process."""
    return {
        "five": train(5, f"{folder}/pair5"),
        "resumed": train(0, f"{folder}/pair8", f"{folder}/one5/stopped.ckpt"),
    }


@pytest.fixture(scope="module")
def results(ranks, tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    for name in ("one5", "one8", "pair5", "pair8", "resumed"):
        (folder / name).mkdir()
    one = {"five": train(5, folder / "one5"), "whole": train(0, folder / "one8")}
    pair = ranks(train_all, str(folder))
    one["resumed"] = train(0, folder / "resumed", str(folder / "pair5" / "stopped.ckpt"))
    saved = {
        name: torch.load(folder / name / "stopped.ckpt", weights_only=True)
        for name in ("one5", "pair5")
    }
    return one, pair, saved


def weights_differ(left, right):
    return largest_difference(left["weights"], right["weights"])


def test_two_ranks_equal_one_process(results):
    one, pair, saved = results
    start = {"weights": dict(build_module().double().forecast.state_dict())}
    assert any(lead for leads in one["five"]["leads"] for lead in leads)
    weights = {n: v for n, v in one["five"]["weights"].items() if n.startswith("network.")}
    fresh = {n: v for n, v in start["weights"].items() if n.startswith("network.")}
    assert largest_difference(weights, fresh) > 1e-3  # it did learn
    for of_rank in (result["five"] for result in pair):
        assert weights_differ(of_rank, one["five"]) <= TOLERANCE
        rows = of_rank["rows"]
        assert largest_difference(of_rank["buffer"], one["five"]["buffer"], rows) <= TOLERANCE
        others = [row for row in range(ROWS) if row not in rows]
        assert not of_rank["buffer"]["lead"][others].any()  # a rank holds its own
        expected = [[leads[row] for row in rows] for leads in one["five"]["leads"]]
        assert of_rank["leads"] == expected
    gathered, whole = saved["pair5"]["replay"], saved["one5"]["replay"]
    assert whole["lead"].amax(1).min() > 0  # every row has forecasts under way
    assert largest_difference(gathered, whole) <= TOLERANCE
    assert torch.equal(gathered["lead"], whole["lead"])


def test_checkpoints_resume_on_another_number_of_ranks(results):
    one, pair, _ = results
    assert weights_differ(one["five"], one["whole"]) > 1e-4
    assert weights_differ(one["resumed"], one["whole"]) <= TOLERANCE
    for of_rank in (result["resumed"] for result in pair):
        assert weights_differ(of_rank, one["whole"]) <= TOLERANCE
        rows = of_rank["rows"]
        assert largest_difference(of_rank["buffer"], one["whole"]["buffer"], rows) <= TOLERANCE
