import time

import torch

from harness.runs.cost import interleaved_seconds, peak_bytes


def test_peaks_are_what_is_held_at_once():
    def two():
        first = torch.ones(1000, 1000)
        second = first + 1
        del first
        return (second * 2)[0, 0]

    size = 4_000_000
    assert 2 * size <= peak_bytes(two) < 2.1 * size
    assert size <= peak_bytes(lambda: torch.ones(1000, 1000)) < 1.1 * size


def test_functions_are_called_in_turn():
    calls = []

    def work(name, seconds):
        calls.append(name)
        time.sleep(seconds)

    found = interleaved_seconds({"a": lambda: work("a", 0.001), "b": lambda: work("b", 0.02)}, 3)
    assert calls == ["a", "b"] * 4
    assert found["b"] > found["a"]
