import runpy
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import xarray as xr
import yaml

from tests.fixtures.coarse_figures import coarse_figures  # noqa: F401
from tests.fixtures.gates_in_folder import GatesInFolder, Result

HERE = Path(__file__).parent
CONFIGS = HERE.parents[1] / "apps" / "video" / "configs"


class Gates(GatesInFolder):
    """Commands of an application, which must succeed."""

    def weather(self, verb: str, *words: object, config: str = "unit") -> Result:
        """Run a verb that must succeed."""
        return self.succeed("weather", verb, "--config", config, *words)

    def opened(self, name: str) -> xr.Dataset:
        """Open a store that a verb has written."""
        return xr.open_zarr(self.folder / name, consolidated=True)

    def endoscopy(self, verb: str, *words: object, config: str = "unit") -> Result:
        """Run a verb that must succeed."""
        return self.succeed("endoscopy", verb, "--config", config, *words)

    def video(self, verb: str, *words: object, config: str = "small") -> Result:
        """Run a verb that must succeed, by default on a feed smaller than that of `unit`."""
        return self.succeed("video", verb, "--config", config, *words)


@pytest.fixture(scope="session")
def gates(tmp_path_factory):
    """The unit configuration with its world prepared, its network trained and reports observed."""
    run = Gates(tmp_path_factory.mktemp("unit"))
    run.weather("prepare")
    run.weather("fit", "--trainer.enable_model_summary", "false")
    run.weather("observe", "--stations", 200)
    return run


@pytest.fixture(scope="session")
def sizing(tmp_path_factory):
    """The unit configuration of endoscopy with its frames rendered and its network trained."""
    run = Gates(tmp_path_factory.mktemp("sizing"))
    run.endoscopy("render")
    run.endoscopy("fit")
    return run


@pytest.fixture(scope="session")
def small_feed():
    """``small_feed(folder)`` writes ``small.yaml``: `unit` of video with fewer rows."""

    def write(folder: Path, epochs: int = 1, rows: int = 1500) -> Path:
        content = yaml.safe_load((CONFIGS / "unit.yaml").read_text())
        content["data"]["source"]["init_args"] |= {"rows": rows, "users": 40, "videos": 60}
        content["trainer"] = {"max_epochs": epochs, "log_every_n_steps": 1}
        path = folder / "small.yaml"
        path.write_text(yaml.safe_dump(content, sort_keys=False))
        return path

    return write


@pytest.fixture(scope="session")
def feed(tmp_path_factory, small_feed):
    """A small feed with its network trained and its contest evaluated; not to be changed."""
    run = Gates(tmp_path_factory.mktemp("feed"))
    small_feed(run.folder)
    run.video("fit")
    run.video("evaluate")
    return run


@pytest.fixture(scope="session")
def gates_in():
    """``gates_in(folder)`` runs commands in a folder."""
    return Gates


@pytest.fixture(scope="session")
def demo_pages():
    """``served`` a ``demo`` command and ``opened`` its page in a browser."""
    return SimpleNamespace(**runpy.run_path(str(HERE.parent / "fixtures" / "demo_page.py")))


@pytest.fixture(scope="session")
def chromium(demo_pages):
    return demo_pages.browser_path()


@pytest.fixture(scope="session")
def write():
    """``write.images``, ``write.video`` and the like make sources of frames; ``write.weights``."""
    made = runpy.run_path(str(HERE.parent / "endoscopy" / "conftest.py"))
    names = ("images", "video", "dicom")
    writers = {name: made[f"write_{name}"] for name in names}
    return SimpleNamespace(
        **writers, padded=made["padded"], picture=made["picture"], crf_18=made["CRF_18"],
        header=made["header"], shared=made["SHARED"], weights=write_weights,
    )  # fmt: skip


def write_weights(folder, **changes):
    """Write an untrained sizing network for 64 pixels with intervals."""
    from endoscopy.bundles.sizing_bundle import SizingBundle
    from endoscopy.evaluation.conformal import SplitConformal
    from endoscopy.models.sizer import tiny_resnet
    from endoscopy.training.targets import LogSize

    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = tiny_resnet(("rgb_mask",), geometry=True).eval()
    conformal = SplitConformal(tuple(np.linspace(-0.3, 0.3, 99)))
    settings = {"intervals": dict.fromkeys(("masks", "boxes", "automatic"), conformal)} | changes
    return SizingBundle(model, LogSize(), 64, **settings).save(folder)
