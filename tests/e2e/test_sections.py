"""Sections of configurations, after the names of verbs."""

import inspect
from pathlib import Path

import yaml

from apps.endoscopy.commands import EndoscopyCLI, EndoscopyTrainer
from apps.video.training_verbs import VideoCLI, VideoTrainer
from apps.weather.command_line import WeatherCLI
from apps.weather.commands import WeatherTrainer

APPS = {EndoscopyCLI: EndoscopyTrainer, VideoCLI: VideoTrainer, WeatherCLI: WeatherTrainer}


def test_sections_of_verbs_hold_their_options():
    for app, trainer in APPS.items():
        configs = sorted((Path(inspect.getfile(app)).parent / "configs").glob("*.yaml"))
        assert configs
        for path in configs:
            content = yaml.safe_load(path.read_text())
            for verb in set(content) & set(app.verbs) - {"fit"}:
                known = inspect.signature(getattr(trainer, verb)).parameters
                assert set(content[verb]) <= set(known), (path, verb)
