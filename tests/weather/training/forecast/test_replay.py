import pytest
import torch

from core_gates.errors import GatesError
from weather.training.forecast_module import ReplayBuffer, Underway

SHAPE = (1, 2, 2)


def buffer(**changes):
    arguments = {"rows": 2, "slots": 3, "max_lead": 4, "fraction": 0.5, "seed": 0} | changes
    return ReplayBuffer(arguments.pop("rows"), arguments.pop("slots"), SHAPE, **arguments)


def underway(value, lead=1, member=0, time=5):
    return Underway(torch.full((2, *SHAPE), float(value)), member, time, lead)


def test_an_empty_buffer_gives_the_data():
    assert all(buffer(fraction=0.99).draw(step, 0) is None for step in range(50))
    with pytest.raises(ValueError, match="slot 1 of row 0 is empty"):
        buffer().at(0, 1)


def test_a_forecast_comes_back_as_it_was():
    kept = buffer()
    kept.keep(0, 1, None, underway(3.0, lead=2, member=7, time=11))
    slot = int(kept.lead[1].nonzero())
    found = kept.at(1, slot)
    assert found[1:] == (7, 11, 2)
    assert torch.equal(found.frames, torch.full((2, *SHAPE), 3.0))
    assert not kept.lead[0].any()  # rows do not exchange


def test_new_forecasts_fill_empty_slots_before_they_replace():
    kept = buffer()
    for value in range(3):
        kept.keep(value, 0, None, underway(value))
    assert sorted(kept.frames[0, :, 0, 0, 0, 0].tolist()) == [0, 1, 2]
    kept.keep(3, 0, None, underway(9))
    values = kept.frames[0, :, 0, 0, 0, 0].tolist()
    assert len(values) == 3
    assert values.count(9) == 1


def test_a_continued_forecast_stays_in_its_slot_until_it_expires():
    kept = buffer()
    kept.keep(0, 0, 1, underway(1, lead=4))
    assert kept.lead[0].tolist() == [0, 4, 0]
    kept.keep(1, 0, 1, underway(2, lead=5))
    assert not kept.lead.any()
    kept.keep(2, 0, 1, underway(1))
    kept.drop(0, 1)
    kept.drop(0, None)
    assert not kept.lead.any()


def test_the_fraction_of_draws():
    kept = buffer(fraction=0.3)
    for value in range(3):
        kept.keep(value, 0, None, underway(value))
    draws = [kept.draw(step, 0) for step in range(2000)]
    taken = [slot for slot in draws if slot is not None]
    assert len(taken) / len(draws) == pytest.approx(0.3, abs=0.03)
    for slot in range(3):
        assert taken.count(slot) / len(taken) == pytest.approx(1 / 3, abs=0.06)
    assert draws == [kept.draw(step, 0) for step in range(2000)]
    other = buffer(fraction=0.3, seed=1)
    other.load_state_dict(kept.state_dict())
    assert draws != [other.draw(step, 0) for step in range(2000)]


def test_content_survives_a_checkpoint():
    kept = buffer()
    for step in range(5):
        for row in range(2):
            kept.keep(step, row, kept.draw(step, row), underway(step + row, lead=step % 3 + 1))
    state = {name: value.clone() for name, value in kept.state_dict().items()}
    again = buffer()
    again.load_state_dict(state)
    kept.keep(9, 0, 0, underway(99))
    for name, value in again.state_dict().items():
        assert torch.equal(value, state[name])
    with pytest.raises(GatesError, match=r"2 rows with 3 slots, this run has 2 with 4.*slots 3"):
        buffer(slots=4).load_state_dict(state)


@pytest.mark.parametrize(
    "change", [{"rows": 0}, {"slots": 0}, {"max_lead": 0}, {"fraction": 1.0}, {"fraction": -0.1}]
)
def test_impossible_numbers(change):
    with pytest.raises(ValueError, match=next(iter(change))):
        buffer(**change)
