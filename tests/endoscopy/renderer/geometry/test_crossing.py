import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from endoscopy.renderer import march
from endoscopy.renderer.march import Bracket, close_in, first_crossing


class Line:
    """Values of ``(root - distance) * slope * (1 + bow * distance)``."""

    def __init__(self, root, slope, bow):
        self.parts = root, slope, bow

    def select(self, index):
        self.parts = tuple(part[index] for part in self.parts)

    def value(self, distance):
        root, slope, bow = self.parts
        return (root - distance) * slope * (1 + bow * distance)


class Table:
    """Values at whole distances."""

    def __init__(self, values):
        self.values = values

    def select(self, index):
        self.values = self.values[:, index]

    def value(self, distance):
        return self.values.gather(0, distance.round().long())


@given(st.lists(st.lists(st.floats(-1, 1, width=32), min_size=5, max_size=5), min_size=1))
def test_the_first_crossing_is_found(table):
    values = torch.tensor(table).t()
    origin, extent = torch.zeros(len(table)), torch.full((len(table),), 4.0)
    crossed, bracket = first_crossing(Table(values), origin, extent, torch.linspace(0, 1, 5))
    expected = [ray for ray, column in enumerate(table) if min(column[1:]) < 0]
    assert crossed.tolist() == expected
    for place, ray in enumerate(expected):
        first = next(k for k in range(1, 5) if table[ray][k] < 0)
        assert (bracket.low[place], bracket.high[place]) == (first - 1, first)
        assert bracket.below[place] == values[first, ray] < 0 < bracket.above[place]


def test_many_samples_are_taken_in_blocks(monkeypatch):
    monkeypatch.setattr(march, "BLOCK", 4)
    values = torch.tensor([[1.0, 1, -1, 1, 1], [1, 1, 1, 1, -1], [1, 1, 1, 1, 1]]).t()
    origin, extent = torch.zeros(3), torch.full((3,), 4.0)
    crossed, bracket = first_crossing(Table(values), origin, extent, torch.linspace(0, 1, 5))
    assert crossed.tolist() == [0, 1]
    assert bracket.high.tolist() == [2, 4]


def test_roots_are_closed_in_and_the_function_is_left_alone():
    root = torch.linspace(0.05, 0.95, 19)
    function = Line(root, torch.full((19,), 30.0), torch.linspace(-0.9, 5, 19))
    low, high = torch.zeros(19), torch.ones(19)
    bracket = Bracket(low, function.value(low), high, function.value(high))
    assert (bracket.secant() - root).abs().max() > 0.1
    assert_close(close_in(function, bracket, 0.02), root, atol=5e-3, rtol=0)
    assert len(function.parts[0]) == 19
