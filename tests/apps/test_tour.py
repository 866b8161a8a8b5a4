import importlib
import sys
from types import ModuleType

import pytest

from apps.main import APPS, App, main
from core_gates.errors import MissingExtraError
from harness.report.page import TourRow, TourStop, TourTask


@pytest.fixture
def tour(monkeypatch):
    """Run ``gates tour`` with functions as its stops."""

    def run(functions, *words):
        table = {"tour": APPS["tour"]}
        for name, function in functions.items():
            module = ModuleType(f"stop_{name}")
            module.tour = function
            monkeypatch.setitem(sys.modules, module.__name__, module)
            table[name] = App("", "x", {"go": "x"}, stop=f"stop_{name}:tour")
        return main(["tour", *words], table)

    return run


def good_stop(folder, say):
    folder.mkdir(parents=True)
    (folder / "proof").touch()
    say("halfway")
    rows = [TourRow("Adas", "rmse z500 [m]", "31.2", "49.8 background", "better")]
    done = [TourTask("size it", "7 mm", "gates size", 3.0), TourTask("map it", "4 m", "gates map")]
    return TourStop("Weather & more", rows, lambda page: page.text("drawn by the stop"), done)


def missing_stop(folder, say):
    raise MissingExtraError("sea", "xarray")


def test_the_tour_prints_a_table_and_writes_a_page(tour, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert tour({"weather": good_stop, "sea": missing_stop}) == 0
    out = capsys.readouterr().out
    assert "halfway" in out
    assert "31.2" in out
    assert "skipped: sea needs xarray: pip install 'gatesuite[sea]'" in " ".join(out.split())
    assert out.splitlines()[-1] == "runs/tour/report.html"
    page = (tmp_path / "runs" / "tour" / "report.html").read_text()
    for text in (
        "Weather &amp; more", "drawn by the stop", "49.8 background", "sea needs xarray",
        "What it does", "<code>gates size</code>", "What the gates add",
    ):  # fmt: skip
        assert text in page
    assert '"tile' not in page
    assert (tmp_path / "runs" / "tour" / "weather" / "proof").exists()


def test_one_stop_only(tour, tmp_path, capsys):
    both = {"weather": good_stop, "sea": missing_stop}
    assert tour(both, "--root", str(tmp_path), "--only", "weather") == 0
    assert "skipped" not in capsys.readouterr().out


def test_nothing_to_show_is_a_failure(tour, tmp_path):
    assert tour({"sea": missing_stop}, "--root", str(tmp_path)) == 1
    assert not (tmp_path / "tour" / "report.html").exists()


def test_a_stop_with_a_missing_package_names_its_extra(monkeypatch, tmp_path, capsys):
    (tmp_path / "needy_stop.py").write_text("import a_package_that_is_missing\n")
    monkeypatch.syspath_prepend(tmp_path)
    table = {"tour": APPS["tour"], "sea": App("", "x", stop="needy_stop:tour")}
    assert main(["tour", "--root", str(tmp_path)], table) == 1
    assert "pip install 'gatesuite[sea]'" in " ".join(capsys.readouterr().out.split())


def test_the_stops_are_those_of_the_table(capsys):
    assert main(["tour", "--only", "sea"]) == 2
    stops = [name for name, app in APPS.items() if app.stop]
    assert f"choose from {stops}" in capsys.readouterr().err


@pytest.mark.parametrize("name", [name for name, app in APPS.items() if app.stop])
def test_every_stop_is_a_function(name):
    module, _, function = APPS[name].stop.partition(":")
    assert callable(getattr(importlib.import_module(module), function))
