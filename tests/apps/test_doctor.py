from importlib.metadata import metadata

import pytest

import apps.doctor
from apps.doctor import DISTRIBUTION, Finding, findings, machine
from apps.main import APPS, App, main
from language.hf.locate import OLDEST


@pytest.mark.parametrize(
    ("wanted", "found", "fine"),
    [(">=2.0", "2.1", True), (">=2.0", "1.9", False), (">=2.0", None, False), ("", "1", True),
     (">=2.6,<2.7", "2.7.1", False), (">=2.6", "2.13.0+cpu", True)],
)  # fmt: skip
def test_versions_are_compared(wanted, found, fine):
    assert Finding("base", "x", wanted, found).fine is fine


def test_every_extra_is_looked_at():
    found = findings()
    names = {(item.extra, item.package) for item in found}
    assert {("base", "torch"), ("weather", "xarray"), ("dev", "pytest")} <= names
    torch = next(item for item in found if item.package == "torch")
    assert torch.fine


def test_the_machine_is_described():
    facts = machine()
    assert facts["python"].startswith("3.")
    assert {
        "platform",
        "torch",
        "Triton",
        "C++ compiler",
        "GPU",
    } <= facts.keys() or "GPU 0" in facts


@pytest.mark.parametrize(
    ("extra", "command", "code"),
    [
        ("weather", "pip install 'gatesuite[weather]'", 1),
        ("base", "pip install gatesuite", 1),
        ("bench", "pip install 'gatesuite[bench]'", 0),  # not needed to run anything
    ],
)
def test_what_is_missing_comes_with_its_command(monkeypatch, capsys, extra, command, code):
    missing = [Finding("base", "torch", ">=2", "2.5"), Finding(extra, "zarr", ">=3", None)]
    monkeypatch.setattr(apps.doctor, "findings", lambda: missing)
    assert main(["doctor"]) == code
    out = " ".join(capsys.readouterr().out.split())
    assert f"{extra}: zarr missing or too old: {command}" in out


@pytest.mark.fault("46 H1")
def test_what_needs_a_hand_comes_first(monkeypatch, capsys):
    missing = [Finding("bench", "jax", ">=3", None), Finding("weather", "zarr", ">=3", None)]
    monkeypatch.setattr(apps.doctor, "findings", lambda: missing)
    main(["doctor"])
    out = capsys.readouterr().out
    places = [out.index(part) for part in ("weather: zarr", "bench: jax", "machine", "packages")]
    assert places == sorted(places)
    assert places[0] == 0


@pytest.mark.fault("46 A1")
def test_an_installed_release_below_the_floor_is_named(monkeypatch, capsys):
    """Of transformers, whose older models ignore the cache that block gates give them."""
    floor = next(one.wanted for one in findings() if one[:2] == ("language", "transformers"))
    found = [Finding("language", "transformers", f">={OLDEST}", "5.23.0")]
    assert Finding("language", "transformers", floor, OLDEST).fine
    monkeypatch.setattr(apps.doctor, "findings", lambda: found)
    assert main(["doctor"]) == 1
    out = " ".join(capsys.readouterr().out.split())
    assert f"language: transformers (5.23.0, wanted >={OLDEST}) missing or too old: pip" in out


def test_a_whole_installation_is_fine(monkeypatch, capsys):
    monkeypatch.setattr(apps.doctor, "findings", lambda: [Finding("base", "torch", ">=2", "2.5")])
    assert main(["doctor"]) == 0
    assert "everything is there" in capsys.readouterr().out


@pytest.mark.parametrize(("extra", "code"), [("sea", 1), ("sea-demo", 1), ("land", 0)])
def test_the_table_says_which_extras_are_needed(monkeypatch, extra, code):
    lacking = [Finding(extra, "x", ">=3", None)]
    monkeypatch.setattr(apps.doctor, "findings", lambda: lacking)
    table = {"doctor": APPS["doctor"], "sea": App("", "x", extras=("sea", "sea-demo"))}
    assert main(["doctor"], table) == code


def test_the_extras_of_the_table_exist():
    provided = set(metadata(DISTRIBUTION).get_all("Provides-Extra"))
    for app in APPS.values():
        assert provided.issuperset(app.extras)
