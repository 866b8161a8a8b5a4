import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest

SHOP = Path(__file__).with_name("shop.py")


@pytest.fixture(scope="session")
def shop():
    """The names of ``shop.py``."""
    return SimpleNamespace(**runpy.run_path(str(SHOP)))


@pytest.fixture(scope="session")
def model_folder(shop, tmp_path_factory):
    """The folder of an untrained model of the shop; not to be changed."""
    return shop.write_model(tmp_path_factory.mktemp("models") / "shop")
