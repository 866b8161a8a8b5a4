import contextlib
import io
import os
from pathlib import Path
from typing import NamedTuple

import pytest

from apps.main import main


class Result(NamedTuple):
    code: int
    out: str
    err: str


class Gates:
    """``gates`` in a folder, in this process: importing lightning anew would cost six seconds."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __call__(self, *words: object) -> Result:
        out, err = io.StringIO(), io.StringIO()
        before = Path.cwd()
        os.chdir(self.folder)
        try:
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                try:
                    code = main([str(word) for word in words])
                except SystemExit as stop:
                    code = int(stop.code or 0)
        finally:
            os.chdir(before)
        return Result(code, out.getvalue(), err.getvalue())

    def weather(self, verb: str, *words: object, config: str = "unit") -> Result:
        """Run a verb that must succeed."""
        result = self("weather", verb, "--config", config, *words)
        assert result.code == 0, result.err
        return result


@pytest.fixture(scope="session")
def gates(tmp_path_factory):
    """The unit configuration with its world prepared, its network trained and reports observed."""
    run = Gates(tmp_path_factory.mktemp("unit"))
    run.weather("prepare")
    run.weather("fit", "--trainer.enable_model_summary", "false")
    run.weather("observe", "--stations", 200)
    return run
