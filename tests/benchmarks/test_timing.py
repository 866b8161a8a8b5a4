import itertools

import pytest
import torch

from benchmarks.comparison import Timing, interleave, limit_calls, ratio


class Machine:
    """A clock that advances only when a call works, with a load that varies from round to round."""

    def __init__(self):
        self.now = 0.0
        self.load = itertools.cycle([1.0])
        self.order = []

    def call(self, name, seconds):
        def run():
            self.order.append(name)
            self.now += seconds * next(self.load)

        return run

    def clock(self):
        return self.now


def test_calls_take_turns_and_the_order_is_turned_around():
    machine = Machine()
    calls = {"a": machine.call("a", 1.0), "b": machine.call("b", 2.0)}
    interleave(calls, rounds=3, sample_seconds=0.5, clock=machine.clock)
    assert "".join(machine.order) == "aabb" + "ab" + "ba" + "ab"


def test_short_calls_are_repeated_and_times_are_per_call():
    machine = Machine()
    calls = {"short": machine.call("s", 0.01), "long": machine.call("l", 3.0)}
    timings = interleave(calls, rounds=2, sample_seconds=0.1, clock=machine.clock)
    assert timings["short"].seconds == pytest.approx([0.01, 0.01])
    assert timings["long"].seconds == pytest.approx([3.0, 3.0])
    assert machine.order.count("s") == 2 + 2 * 10


def test_the_first_call_is_kept_apart():
    machine = Machine()
    machine.load = itertools.chain([100.0], itertools.repeat(1.0))
    timing = interleave({"a": machine.call("a", 1.0)}, rounds=3, clock=machine.clock)["a"]
    assert (timing.first, timing.median) == (pytest.approx(100.0), pytest.approx(1.0))


def test_the_first_call_may_have_its_own_clock():
    machine = Machine()
    timing = interleave(
        {"a": machine.call("a", 1.0)},
        rounds=2,
        clock=machine.clock,
        first_clock=lambda: 60 * machine.now,
    )["a"]
    assert (timing.first, timing.median) == (60.0, 1.0)


def test_the_ratio_is_taken_within_rounds():
    """A machine that is slow for some rounds does not change the ratio; that of medians would."""
    mine = Timing([1.0, 10.0, 1.0, 10.0, 2.0], 0.0)
    theirs = Timing([2.0, 20.0, 2.0, 20.0, 4.0], 0.0)
    assert ratio(mine, theirs) == 0.5
    assert ratio(Timing([1.0, 8.0, 9.0], 0.0), Timing([1.0, 2.0, 3.0], 0.0)) == 3.0


def test_the_limits_do_the_work_that_they_claim():
    calls, amounts = limit_calls(torch.device("cpu"))
    product, target = calls["gemm"](), calls["stream"]()
    assert amounts["gemm"] == 2 * product.shape[0] ** 3
    assert amounts["stream"] == 2 * 4 * target.numel()
    assert target.max() > 0
