"""A configuration as its verbs see it: run, model and data."""

from types import SimpleNamespace

import pytest

from apps.weather.command_line import WeatherCLI
from apps.weather.commands import WeatherTrainer
from weather.training.adas_module import AdasModule
from weather.training.stream import AssimilationDataModule


class Look(WeatherTrainer):
    """A verb that does nothing."""

    def look(self, model: AdasModule, datamodule: AssimilationDataModule) -> None:
        """Do nothing.

        Args:
            model: Filled in by the command line.
            datamodule: Filled in by the command line.
        """


class LookCLI(WeatherCLI):
    verbs = (*WeatherCLI.verbs, "look")


@pytest.fixture
def configured(tmp_path):
    """``configured(config, *words)`` returns run, model, data and source of a configuration."""

    def look(config, *words):
        words = ["look", "--config", config, "--root", str(tmp_path / "runs"), *map(str, words)]
        cli = LookCLI(AdasModule, AssimilationDataModule, Look, words)
        data = cli.datamodule
        run = cli.trainer._begin(data)
        return SimpleNamespace(run=run, model=cli.model, data=data, source=data.source)

    return look
