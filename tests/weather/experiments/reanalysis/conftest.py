"""A small store of made-up weather, written once a session, and sources of it."""

import shutil
from types import SimpleNamespace

import pytest

from benchmarks.weather.synthetic_store import write_synthetic_store
from weather.experiments.reanalysis import store_data
from weather.experiments.reanalysis.source import ReanalysisSource


@pytest.fixture(scope="session")
def own(tmp_path_factory):
    """``own.source(**changes)`` has all its files; ``own.store``, ``own.folder``."""
    folder = tmp_path_factory.mktemp("own")
    store = write_synthetic_store(folder / "own.zarr", frames=120, rows=17, columns=32)

    def source(**changes):
        arguments = {"store": str(store), "background": "12h", "cache": str(folder / "cache")}
        found = ReanalysisSource(**{**arguments, **changes})
        found.prepare()
        return found

    with pytest.MonkeyPatch.context() as patch:  # a climatology of the days that are stored
        patch.setattr(store_data, "WINDOW_DAYS", 21)
        source().make_truth()
    return SimpleNamespace(source=source, store=store, folder=folder, copy=shutil.copytree)
