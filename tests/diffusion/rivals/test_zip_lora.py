"""ZipLoRA, and how it is fitted."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close

from core_gates.errors import GatesError
from diffusion.experiments.trained_gates import distill, objective, taught
from diffusion.fusion.fusion_tasks import FusionTask
from diffusion.lora_file import Factors, LoraBundle
from diffusion.models.embedded_base import transformer_of
from diffusion.models.flow_matching import velocity
from diffusion.models.text_encoders import TextStates
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


LAYERS = ("transformer_blocks.0.attn.to_q", "transformer_blocks.0.ff.net.2")


@pytest.fixture
def model():
    torch.manual_seed(0)
    made = transformer_of("unit").eval()
    torch.nn.init.normal_(made.proj_out.weight, std=0.2)
    return made


@pytest.fixture
def strong_two(model):
    """Two adapters of layers, so strong that their sum is far from each of them."""

    def adapter(seed):
        draw, modules = torch.Generator().manual_seed(seed), {}
        for name in LAYERS:
            outputs, inputs = model.get_submodule(name).weight.shape
            a, b = (torch.randn(*size, generator=draw) for size in ((2, inputs), (outputs, 2)))
            modules[name] = Factors(a, 0.5 * b, 1.0)
        return LoraBundle("flux", modules)

    return {"c": adapter(1), "s": adapter(2)}


@pytest.fixture
def seen(model):
    """Images and captions of each adapter: three of one, two of the other."""
    draw = torch.Generator().manual_seed(3)
    tokens, pooled = model.config.joint_attention_dim, model.config.pooled_projection_dim
    channels = model.config.in_channels // 4

    def task(name, count):
        size = (count, channels, 8, 8)
        text = (torch.randn(count, *own, generator=draw) for own in ((4, tokens), (pooled,)))
        return FusionTask((name,), torch.randn(size, generator=draw), TextStates(*text))

    return {"c": task("c", 3), "s": task("s", 2)}


def alone(model, adapters, name, x, t, text):
    """What the model predicts with ΔW of one adapter in its weights."""
    for module, own in adapters[name].modules.items():
        model.get_submodule(module).weight.data += own.delta_weight()
    found = velocity(model, x, t, text).detach()
    for module, own in adapters[name].modules.items():
        model.get_submodule(module).weight.data -= own.delta_weight()
    return found


def test_each_adapter_teaches_alone_on_its_own_images(model, strong_two, seen):
    examples = taught(ZipLora(model, strong_two), seen, draws=7, seed=5)
    for place, (name, task) in enumerate(seen.items()):
        x, t, target = (part[place] for part in examples.at)
        text = TextStates(*(part[place] for part in examples.text))
        rows = torch.arange(7) % len(task.latents)
        assert torch.equal(text.pooled, task.text.pooled[rows])
        noise = (x - (1 - t.view(-1, 1, 1, 1)) * task.latents[rows]) / t.view(-1, 1, 1, 1)
        assert 0.9 < noise.std() < 1.1
        assert_close(target, alone(model, strong_two, name, x, t, text), atol=1e-4, rtol=1e-4)
    assert len(examples.at.t.unique()) == 14
    again = taught(ZipLora(model, strong_two), seen, draws=7, seed=5)
    assert torch.equal(again.at.x, examples.at.x)
    assert not torch.equal(taught(ZipLora(model, strong_two), seen, 7, seed=6).at.x, examples.at.x)


def test_the_objective_is_both_errors_and_the_penalty(model, strong_two, seen):
    rival = ZipLora(model, strong_two)
    examples = taught(rival, seen, draws=4)
    torch.manual_seed(1)
    for parameter in rival.parameters():
        torch.nn.init.normal_(parameter)
    with rival, torch.no_grad():
        expected = rival.penalty_weight * rival.penalty()
        for place in range(2):
            x, t, target = (part[place] for part in examples.at)
            text = TextStates(*(part[place] for part in examples.text))
            expected += (velocity(model, x, t, text) - target).square().mean()
        assert_close(objective(rival, examples), expected)
        some = objective(rival, examples, torch.tensor([1, 3]))
    assert not torch.isclose(some, expected)
    # columns that switch the other adapter off solve the first half exactly
    for parameter in rival.parameters():
        parameter.data[0], parameter.data[1] = 1.0, 0.0
    x, t, target = (part[0] for part in examples.at)
    with rival, torch.no_grad():
        found = velocity(model, x, t, TextStates(*(part[0] for part in examples.text)))
    assert_close(found, target, atol=1e-4, rtol=1e-4)


def test_the_objective_falls_and_the_model_stays(model, strong_two, seen):
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    rival = ZipLora(model, strong_two)
    examples = taught(rival, seen, draws=6)
    with rival, torch.no_grad():
        start = float(objective(rival, examples))
    values = distill(rival, examples, steps=40, batch_size=6, learning_rate=0.05)
    with rival, torch.no_grad():
        end = float(objective(rival, examples))
    assert len(values) == 40
    assert values[0] == pytest.approx(start, rel=1e-5)  # all examples in each step
    assert end < 0.6 * start
    assert not rival.attached
    assert all(torch.equal(model.state_dict()[name], old) for name, old in before.items())
    assert not any(p.requires_grad or p.grad is not None for p in model.parameters())


def test_refusals_distillation(model, strong_two, seen):
    rival = ZipLora(model, strong_two)
    with pytest.raises(GatesError, match="adapter 's' has no images that it could teach"):
        taught(rival, {"c": seen["c"]}, draws=2)
    with pytest.raises(GatesError, match="found 0 draws"):
        taught(rival, seen, draws=0)
    with rival, pytest.raises(GatesError, match="the adapters are attached: detach them"):
        taught(rival, seen, draws=2)
    examples = taught(rival, seen, draws=2)
    with pytest.raises(GatesError, match="found 0 steps of 4 examples"):
        distill(rival, examples, steps=0)
    rival.columns[LAYERS[0].replace(".", "___")].data[0, 0] = float("nan")
    with pytest.raises(GatesError, match="the objective is nan at step 0: lower the learning rate"):
        distill(rival, examples, steps=2)
    assert not rival.attached
