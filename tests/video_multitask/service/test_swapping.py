import json
import shutil

import pytest

from core_gates.errors import GatesError
from video_multitask.service.serving_model import Models, find_model


@pytest.fixture
def models_of(toy, tmp_path):
    def build(place):
        outcomes = []
        models = Models(place, toy.Multiplier.load, outcomes.append, poll_s=0.01)
        models.outcomes = outcomes
        return models

    return build


def settle(models):
    """Look twice: a change must be stable."""
    return [models.look(), models.look()]


def test_a_changed_folder_is_warmed_up_and_put_in_place(toy, tmp_path, models_of):
    models = models_of(toy.write_model(tmp_path / "model", 2.0))
    old = models.current
    assert old.warm
    assert settle(models) == [False, False]
    toy.write_model(tmp_path / "model", 3.0)
    assert models.current is old
    assert (settle(models), models.current.version) == ([False, True], "times 3.0")
    assert models.current.warm
    assert (settle(models), models.outcomes) == ([False, False], ["swapped"])


def test_a_folder_that_still_grows_is_waited_for(toy, tmp_path, models_of):
    models = models_of(toy.write_model(tmp_path / "model", 2.0))
    toy.write_model(tmp_path / "model", 3.0)
    for part in range(3):
        (tmp_path / "model" / f"part{part}").touch()
        assert not models.look()
    assert models.look()


@pytest.mark.parametrize("kind", ["manifest", "link"])
def test_another_folder_is_named(toy, tmp_path, models_of, kind):
    for number in (2, 3):
        toy.write_model(tmp_path / f"m{number}", number)
    place = tmp_path / ("current.json" if kind == "manifest" else "current")

    def name(folder):
        if kind == "manifest":
            place.write_text(json.dumps({"folder": folder}))
        else:
            place.unlink(missing_ok=True)
            place.symlink_to(tmp_path / folder)

    name("m2")
    models = models_of(place)
    assert models.current.version == "times 2"
    name("m3")
    assert (settle(models), models.current.version) == ([False, True], "times 3")
    name("m2")  # back again
    assert (settle(models), models.current.version) == ([False, True], "times 2")


BROKEN = {
    "no file": (lambda folder: (folder / "factor.json").unlink(), "factor.json is missing"),
    "cut": (lambda folder: (folder / "factor.json").write_text('{"fac'), "Unterminated string"),
    "other fields": (
        lambda folder: (folder / "factor.json").write_text(
            '{"factor": 3, "interface": {"the field x": "number", "the field y": "text"}}'
        ),
        "is refused: it has in addition the field x, number; it has in addition the field y, text: "
        "clients would fail; start a separate service for it",
    ),
    "fails at warm-up": (
        lambda folder: (folder / "factor.json").write_text('{"factor": NaN}'),
        "the factor is not finite",
    ),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_a_broken_folder_is_refused_once_and_the_old_model_stays(
    toy, tmp_path, models_of, caplog, fault
):
    breaking, words = BROKEN[fault]
    folder = toy.write_model(tmp_path / "model", 2.0)
    models = models_of(folder)
    old = models.current
    breaking(folder)
    for _ in range(4):
        assert not models.look()
    assert models.current is old
    assert models.outcomes == ["refused"]
    (line,) = [r.getMessage() for r in caplog.records]
    assert words in line
    assert "times 2.0 stays in service" in line
    assert "\n" not in line
    toy.write_model(folder, 4.0)  # repaired
    assert (settle(models), models.current.version) == ([False, True], "times 4.0")


def test_a_folder_that_is_gone_is_told_once(toy, tmp_path, models_of, caplog):
    folder = toy.write_model(tmp_path / "model", 2.0)
    models = models_of(folder)
    shutil.rmtree(folder)
    for _ in range(3):
        assert not models.look()
    assert [r.getMessage() for r in caplog.records] == [
        f"{folder} is not a folder of a model: check the path; times 2.0 stays in service"
    ]
    toy.write_model(folder, 7.0)
    assert settle(models) == [False, True]


FAULTS = {
    "nothing": ("none", None, "is not a folder of a model"),
    "no JSON": ("m.json", "{", "cannot be read as JSON"),
    "a list": ("m.json", "[]", 'expected {"folder": "NAME"}'),
    "another entry": ("m.json", '{"model": "x"}', 'expected {"folder": "NAME"}'),
    "a missing folder": ("m.json", '{"folder": "x"}', "x is not a folder of a model"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_names_no_model_is_refused(tmp_path, fault):
    name, content, words = FAULTS[fault]
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(GatesError) as caught:
        find_model(tmp_path / name)
    assert words in str(caught.value)
