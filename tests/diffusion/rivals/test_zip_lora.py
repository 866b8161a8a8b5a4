"""ZipLoRA: columns of both changes, its penalty, and one adapter of what was learned."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close

from core_gates.errors import GatesError
from diffusion.lora_file import LoraBundle
from diffusion.rivals.zip_lora import ZipLora


@pytest.fixture
def two(bundle):
    return {"c": bundle(1), "s": bundle(2, rank=3, where="attn")}


class Dense(LoraBundle):
    """An adapter whose columns are multiplied."""

    def delta_weight(self, module, weight=None):
        return super().delta_weight(module, weight) * self.metadata["columns"](module)


@pytest.mark.parametrize("first", ["c", "s"])  # s lacks layers
def test_columns_are_weighed(flux, inputs, two, dense, first):
    two = two if first == "c" else dict(reversed(two.items()))
    rival = ZipLora(flux, two).double()
    with rival:
        assert_close(flux(**inputs)[0], dense(two))  # ones at the start
    torch.manual_seed(0)
    for parameter in rival.parameters():
        nn.init.normal_(parameter)

    def columns(place):
        return {"columns": lambda module: rival.columns[module.replace(".", "___")][place]}

    expected = {
        name: Dense(b.family, b.modules, metadata=columns(place))
        for place, (name, b) in enumerate(two.items())
    }
    with torch.no_grad():
        truth = dense(expected, {"c": 0.6, "s": 1.0})
    with rival:
        rival.set_strengths({"c": 0.6})
        assert_close(flux(**inputs)[0].detach(), truth)
    assert_close(dense({"one": rival.bundle}), truth)
    assert rival.bundle.ranks()["transformer_blocks.0.attn.to_q"] == 5


def test_the_penalty_is_the_cosine_of_shared_layers(flux, two):
    rival = ZipLora(flux, two)
    shared = [name for name in two["s"].modules if name in two["c"].modules]
    assert_close(rival.penalty(), torch.tensor(float(len(shared))))
    torch.manual_seed(0)
    for parameter in rival.parameters():
        nn.init.normal_(parameter)
    pairs = [rival.columns[name.replace(".", "___")].detach() for name in shared]
    expected = sum(abs(float(F.cosine_similarity(*pair, dim=0))) for pair in pairs)
    assert rival.penalty().item() == pytest.approx(expected, rel=1e-5)
    optimizer = torch.optim.Adam(rival.parameters(), lr=0.1)
    for _ in range(100):
        optimizer.zero_grad()
        rival.penalty().backward()
        optimizer.step()
    assert rival.penalty().item() < 0.2 * expected
    apart = {"c": two["c"].select(["proj_out"]), "s": two["s"]}
    assert ZipLora(flux, apart).penalty().item() == 0


def test_columns_are_learned_for_a_pair(flux, inputs, two, dense):
    torch.manual_seed(0)
    rival, target = ZipLora(flux, two), dense(two, {"c": 0.3, "s": 0.8})
    optimizer = torch.optim.Adam(rival.parameters(), lr=0.05)
    losses = []
    with rival:
        for _ in range(30):
            loss = (flux(**inputs)[0] - target).square().mean()
            optimizer.zero_grad()
            (loss + rival.penalty_weight * rival.penalty()).backward()
            optimizer.step()
            losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_refusals(flux, two, bundle):
    with pytest.raises(GatesError, match="ZipLoRA is for two adapters, found 3: give two"):
        ZipLora(flux, two | {"x": bundle(3)})
    narrow = ZipLora(flux, {"c": bundle(1, where="attn"), "s": two["s"]})
    with pytest.raises(GatesError, match="nothing is learned for context_embedder"):
        narrow.set_adapters(two)
    with pytest.raises(GatesError, match="found 1: give two"):
        narrow.set_adapters({"c": two["c"]})
    with narrow:
        narrow.set_adapters({"x": bundle(9, where="attn"), "y": two["s"]})
        assert list(narrow.adapters) == ["x", "y"]
