"""Training runs on two processes are those of one: started by the command, or by torchrun."""

import socket

import pytest
import torch

EXACT = ("--accelerator", "cpu", "--precision", "32-true")
TWO = ("--devices", "2")
TOLERANCE = 1e-6
RATES = {"train-gates": "1e-3", "train-retriever": "1e-5"}
"""Small, since Adam makes large steps of what rounding leaves of gradients that are 0."""


@pytest.fixture
def alone(forked, command, place):
    """Return the weights of a training on one process, by the words of its command."""

    def weights(*words):
        kept = place / "alone.ckpt"
        forked.finished([*words, "--root", "alone"], {"KEPT": str(kept)})
        return torch.load(kept, weights_only=True)["state_dict"]

    return weights


def worst(path, expected):
    found = torch.load(path, weights_only=True)["state_dict"]
    assert found.keys() == expected.keys()
    gaps = {n: (found[n] - w).abs().max() / (1 + w.abs().max()) for n, w in expected.items()}
    return max(map(float, gaps.values()))


def as_torchrun(forked, words, kept):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "GROUP_RANK": "0", "MASTER_PORT":
              str(port), "MASTER_ADDR": "127.0.0.1", "TORCHELASTIC_RUN_ID": "tests",
              "GLOO_SOCKET_IFNAME": "lo", "KEPT": str(kept)}  # fmt: skip
    ranks = [
        forked.Forked(words, {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(2)
    ]
    said = [rank.communicate(200)[1].decode() for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], "\n".join(said)[-3000:]
    return said


@pytest.mark.slow
@pytest.mark.distributed
def test_gates_by_the_command(forked, command, alone, place):
    words = command("train-gates", *EXACT, "--learning_rate", RATES["train-gates"], steps=6)
    expected = alone(*words)
    two = [*words, *TWO, "--strategy", "ddp", "--root", "two"]
    said = forked.finished(two, {"KEPT": str(place / "two.ckpt"), "GLOO_SOCKET_IFNAME": "lo"})
    assert worst(place / "two.ckpt", expected) <= TOLERANCE
    assert said.count("gates.safetensors") == 1
    assert len(list(place.glob("two/diffusion/*/table_gates/*/record.json"))) == 1
    assert not list(place.glob("two/diffusion/*/table_gates/.*"))


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("verb", "strategy"),
    [
        pytest.param("train-gates", "ddp", marks=pytest.mark.slow),
        pytest.param("train-gates", "fsdp2", marks=pytest.mark.slow),
        ("train-retriever", "ddp"),
    ],
)
def test_as_torchrun_starts_them(verb, strategy, forked, command, alone, place):
    more = ("--augmented", "false") if verb == "train-retriever" else ()
    words = command(verb, *EXACT, *more, "--learning_rate", RATES[verb], steps=6)
    expected = alone(*words)
    two = [*words, *TWO, "--strategy", strategy, "--root", "two"]
    first, second = as_torchrun(forked, two, place / "two.ckpt")
    assert worst(place / "two.ckpt", expected) <= TOLERANCE
    assert len(list(place.glob("two/diffusion/*/*/*/record.json"))) == 1
    assert "making" in first
    assert "two/diffusion" in first
    assert "two/diffusion" not in second
