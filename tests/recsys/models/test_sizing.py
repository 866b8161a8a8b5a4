import pytest

from core_gates.errors import GatesError
from recsys.models import MODELS, build, sizing
from recsys.models.sizing import num_weights, sized
from recsys.schema import Task

TASKS = [Task("click"), Task("like"), Task("buy")]
NEEDED = {"ESMM": {"conditions": {"buy": "click"}}, "PEPNet": {"prior_dim": 3}}


@pytest.mark.parametrize("name", sorted(set(MODELS) - {"HoME"}))
def test_a_network_of_a_size(name):
    options = {"dim": 12, "hidden_dims": [36], "tower_dims": [7], **NEEDED.get(name, {})}
    found = sized(name, options, 20, TASKS, 60_000)
    weights = sum(p.numel() for p in build(name, found, 20, TASKS).parameters())
    assert num_weights(name, found, 20, TASKS) == weights
    assert abs(weights / 60_000 - 1) < 0.05
    assert found["hidden_dims"] == [3 * found["dim"]]
    assert {k: v for k, v in found.items() if k not in ("dim", "hidden_dims")} == {
        k: v for k, v in options.items() if k not in ("dim", "hidden_dims")
    }
    assert sized(name, found, 20, TASKS, 60_000) == found


def test_the_nearest_width_is_taken():
    found = sized("MMoE", {}, 20, TASKS, 60_000)
    gaps = {}
    for step in (-1, 0, 1):
        dim = found["dim"] + step
        options = {"dim": dim, "hidden_dims": [2 * dim]}
        gaps[step] = abs(num_weights("MMoE", options, 20, TASKS) - 60_000)
    assert min(gaps, key=gaps.get) == 0


def test_widths_of_their_own_default():
    assert set(sized("SharedBottom", {}, 20, TASKS, 9_000)) == {"dim", "hidden_dims"}


def test_a_size_that_no_width_has():
    with pytest.raises(GatesError, match=r"cannot have 500 weights: at dim=1 it has .*tower_dims"):
        sized("PLE", {}, 20, TASKS, 500)
    with pytest.raises(GatesError, match="no network"):
        sized("Ple2", {}, 20, TASKS, 500)


@pytest.mark.fault("video R9")
@pytest.mark.parametrize(("target", "words"), [(1, "at dim="), (100_000, "whatever its dim")])
def test_a_width_without_effect(monkeypatch, target, words):
    options, tried = {**NEEDED["ESMM"], "hidden_dims": None}, []

    def counted(*given):
        tried.append(given)
        assert len(tried) < 100, "the search has no end"
        return num_weights(*given)

    monkeypatch.setattr(sizing, "num_weights", counted)
    with pytest.raises(GatesError, match=f"ESMM cannot have .* weights: .*{words}"):
        sized("ESMM", options, 32, TASKS, target)
