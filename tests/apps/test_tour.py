import sys
from types import ModuleType

import pytest

import apps.tour
from apps.main import main
from apps.tour import TourRow, TourStop
from core_gates.errors import MissingExtraError


@pytest.fixture
def stops(monkeypatch):
    """Replace the stops by functions."""

    def replace(**functions):
        for name, function in functions.items():
            module = ModuleType(f"stop_{name}")
            module.tour = function
            monkeypatch.setitem(sys.modules, module.__name__, module)
        entries = tuple((name, f"stop_{name}:tour") for name in functions)
        monkeypatch.setattr(apps.tour, "STOPS", entries)

    return replace


def good_stop(folder, say):
    folder.mkdir(parents=True)
    (folder / "proof").touch()
    say("halfway")
    rows = [TourRow("Adas", "rmse z500 [m]", "31.2", "49.8 background", "better", True)]
    return TourStop("Weather & more", rows, lambda page: page.text("drawn by the stop"))


def missing_stop(folder, say):
    raise MissingExtraError("sea", "xarray")


def test_the_tour_prints_a_table_and_writes_a_page(stops, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    stops(weather=good_stop, sea=missing_stop)
    assert main(["tour"]) == 0
    out = capsys.readouterr().out
    assert "halfway" in out
    assert "31.2" in out
    assert "skipped: sea needs xarray: pip install '.[sea]'" in " ".join(out.split())
    assert out.splitlines()[-1] == "runs/tour/report.html"
    page = (tmp_path / "runs" / "tour" / "report.html").read_text()
    for text in ("Weather &amp; more", "drawn by the stop", "49.8 background", "sea needs xarray"):
        assert text in page
    assert (tmp_path / "runs" / "tour" / "weather" / "proof").exists()


def test_one_stop_only(stops, tmp_path, capsys):
    stops(weather=good_stop, sea=missing_stop)
    assert main(["tour", "--root", str(tmp_path), "--only", "weather"]) == 0
    assert "skipped" not in capsys.readouterr().out


def test_nothing_to_show_is_a_failure(stops, tmp_path):
    stops(sea=missing_stop)
    assert main(["tour", "--root", str(tmp_path)]) == 1
    assert not (tmp_path / "tour" / "report.html").exists()


def test_a_stop_with_a_missing_package_names_its_extra(monkeypatch, tmp_path, capsys):
    (tmp_path / "needy_stop.py").write_text("import a_package_that_is_missing\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(apps.tour, "STOPS", (("sea", "needy_stop:tour"),))
    assert main(["tour", "--root", str(tmp_path)]) == 1
    assert "pip install '.[sea]'" in " ".join(capsys.readouterr().out.split())
