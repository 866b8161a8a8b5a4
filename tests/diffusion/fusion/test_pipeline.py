"""From a prompt to an image through unmodified pipelines, found adapters included."""

from copy import deepcopy
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from torch import nn
from torch.testing import assert_close

from core_gates import GatesError
from diffusion import AutoLoraPipeline, GatedFusion
from diffusion.data.pictures import save_picture
from diffusion.models.embedded_base import EmbeddedBase, PatchAutoencoder, transformer_of
from diffusion.models.text_encoders import HashedNgrams
from diffusion.rivals import make_rival
from tests.diffusion.random_adapters import random_adapter

STEPS = 3


class Library:
    """Adapters with fixed scores."""

    def __init__(self, adapters):
        self.adapters, self.asked = adapters, []

    def search(self, prompt, k=3):
        self.asked.append((prompt, k))
        scored = [
            SimpleNamespace(name=n, score=1 / (i + 1), weights=0.5 - i / 4)
            for i, n in enumerate(self.adapters)
        ]
        return scored[:k]

    def load(self, name):
        return self.adapters[name]


@pytest.fixture
def base():
    torch.manual_seed(0)
    images = torch.rand(20, 3, 32, 32) * 2 - 1
    found = {"name": "ngrams", "fingerprint": HashedNgrams().fingerprint}
    transformer = transformer_of("unit").eval().requires_grad_(False)
    return EmbeddedBase(transformer, PatchAutoencoder.fitted(images), found)


@pytest.fixture
def library(base):
    model = base.transformer
    other = transformer_of("unit")
    other.proj_out = nn.Linear(8, 8)
    return Library({
        "first": random_adapter(model, 1),
        "sd3-style": random_adapter(model, 2, family="sd3"),
        "wide": random_adapter(other, 4, where="proj_out"),
        "second": random_adapter(model, 3, where="attn"),
        "third": random_adapter(model, 5),
    })  # fmt: skip


@pytest.fixture
def auto(base, library):
    return AutoLoraPipeline(
        base.pipeline(), library, text=HashedNgrams(), height=32, width=32, output_type="pt",
        num_inference_steps=STEPS,
    )  # fmt: skip


def test_adapters_that_fit_are_found_and_used(auto, library, base):
    found = auto("a red heart", k=2, strengths={"second": 0.5}, seed=4)
    assert [(one.name, one.strength, one.score) for one in found.adapters] == [
        ("first", 1.0, 1.0), ("second", 0.5, 0.25),
    ]  # fmt: skip
    assert found.skipped["sd3-style"] == "adapter 'sd3-style' is for sd3, the model is flux"
    assert "has 32 to 48" in found.skipped["wide"]
    assert library.asked == [("a red heart", 2), ("a red heart", 3), ("a red heart", 4)]
    text, model = HashedNgrams(), base.transformer
    fusion = GatedFusion(model, {n: library.adapters[n] for n in ("first", "second")})
    fusion.set_strengths({"second": 0.5})
    with fusion:
        words = text.encode(["a red heart"]), text.encode([""])
        expected = base.images(*words, seeds=[4], steps=STEPS)
    assert torch.equal(found.images, expected)


@pytest.mark.fault("46 D1")
def test_adapters_without_a_name_in_the_prompt_take_no_part_where_others_have_one(auto, library):
    search, calls = library.search, []

    def naming(prompt, k=3):
        return [SimpleNamespace(**vars(o), named=o.name if o.name in prompt else "")
                for o in search(prompt, k)]  # fmt: skip

    library.search = naming
    for prompt, fill in (("a third heart", False), ("a third heart", True), ("a heart", False)):
        found = auto(prompt, k=3, fill=fill, mode=lambda *given: calls.append(given))
        calls.append(([one.name for one in found.adapters], found.skipped.get("second")))
    assert [one for one in calls if isinstance(one[0], list)] == [
        (["third"], "the prompt does not name it, as it does others (cosine -0.25): fill=True, or "
         "--fill, takes it, too"),
        (["first", "second", "third"], None),
        (["first", "second", "third"], None),
    ]  # fmt: skip


def test_the_switch_sees_the_cosines_of_the_search_and_factors_the_roles(auto, library, tmp_path):
    adapters = {name: library.adapters[name] for name in ("first", "third")}
    fusion = GatedFusion(auto.model, adapters, factors=True, switch=True, everywhere=True)
    torch.manual_seed(3)
    with torch.no_grad():
        for gate in fusion.gates.values():
            gate.factors.add_(0.4 * torch.randn(2, 3))
        fusion.context.switch.copy_(torch.tensor([0.5, 0.2, -0.3]))
    for name, score in (("first", 0.5), ("third", 0.25)):
        fusion.describe(scores={name: score})
    assert fusion.scores == {"first": 0.5, "third": 0.25}
    auto.gates = fusion.save_gates(tmp_path / "gates.safetensors")
    library.adapters["third"].metadata["modelspec.tags"] = "3D, Style"
    seen = {}

    def fuse(model, found):
        seen["fusion"] = GatedFusion(model, found, gates=auto.gates)
        return seen["fusion"]

    found = auto("a dog", k=3, seed=1)
    assert [one.role for one in found.adapters] == ["any", "any", "style"]
    assert found.record()["adapters"][2]["role"] == "style"
    assert torch.equal(auto("a dog", k=3, seed=1, mode=fuse).images, found.images)
    assert seen["fusion"].scores == {"first": 0.5, "second": -0.25, "third": -0.5}
    for change in ({"roles": {"third": "any"}}, {"scores": {"third": 0.5}}):
        assert not torch.equal(auto("a dog", k=3, seed=1, **change).images, found.images)
    named = auto("a dog", adapters=["first", "third"], seed=1, mode=fuse)
    assert seen["fusion"].scores == {}
    assert named.adapters[0].score is None


def test_the_same_seed_gives_the_same_pixels_and_the_model_is_left_alone(auto, base):
    before = deepcopy(base.transformer.state_dict())
    one, same, other = (auto("a dog", k=1, seed=seed).images for seed in (1, 1, 2))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    library, auto.library = auto.library, None
    plain = auto("a dog", adapters=[], seed=1)
    auto.library = library
    assert plain.mode == "none"
    assert not torch.equal(plain.images, one)
    assert all(torch.equal(before[n], t) for n, t in base.transformer.state_dict().items())
    assert not any("siblings" in name for name, _ in base.transformer.named_modules())

    def fail(*_):
        raise RuntimeError("on the way")

    with pytest.raises(RuntimeError, match="on the way"):
        auto("a dog", callback_on_step_end=fail)
    assert torch.equal(auto("a dog", adapters=[], seed=1).images, plain.images)


def test_gates_are_recorded_without_another_pixel(auto, library):
    plain = auto("a dog", k=2)
    found = auto("a dog", k=2, record_gates=True)
    assert torch.equal(found.images, plain.images)
    assert plain.gates is None
    gates = found.gates
    assert gates.means.shape == (STEPS, len(gates.sites), 2)
    open_gate = torch.sigmoid(torch.tensor(2.0))
    assert gates.means[:, gates.sites.index("blocks.0.ff_a.0"), 1].isnan().all()
    held = gates.means[~gates.means.isnan()]
    assert_close(held, open_gate.expand_as(held))
    assert gates.by_adapter()["second"] == pytest.approx(float(open_gate))
    record = found.record()["gates"]["second"]
    assert (len(record["by_step"]), set(record["by_layer"])) == (STEPS, set(gates.sites))


def test_recorded_gates_are_the_true_means_by_step(auto, base, library, tmp_path):
    adapters = {n: library.adapters[n] for n in ("first", "third")}
    fusion = GatedFusion(base.transformer, adapters)
    torch.manual_seed(5)
    for parameter in fusion.parameters():
        nn.init.normal_(parameter, std=0.3)
    auto.gates = fusion.save_gates(tmp_path / "gates.safetensors")
    found = auto("a dog", adapters=list(adapters), record_gates=True).gates
    seen = []
    with fusion:
        layer = fusion.layers["blocks.0.attn.a_to_out"]
        layer.register_forward_hook(
            lambda layer, args, _: seen.append(layer.gate_values(args[0]).mean((0, 1, 3)))
        )
        auto.pipe.transformer = base.transformer
        words = auto._words("a dog", options := auto._options({}))
        auto.pipe(**words, **options, generator=torch.Generator().manual_seed(0))
    assert len(seen) == 2 * STEPS
    expected = torch.stack(seen).view(STEPS, 2, 2).mean(1)
    assert_close(found.means[:, found.sites.index("blocks.0.attn.a_to_out")], expected)
    assert expected.std(0).max() > 1e-4


def test_rivals_are_told_their_step(auto, base, library):
    adapters = {n: library.adapters[n] for n in ("first", "third")}
    told = []

    def switch(model, given):
        made = make_rival("switch", model, given, tau=1)
        at = made.at
        made.at = lambda step, steps: (told.append((step, steps)), at(step, steps))
        return made

    found = auto("a dog", adapters=adapters, mode=switch)
    assert (told, found.mode) == ([(0, STEPS), (1, STEPS), (2, STEPS)], "Switch")
    assert not torch.equal(found.images, auto("a dog", adapters=adapters, mode="sum").images)


def test_a_picture_with_its_record(auto, tmp_path):
    found = auto("a dog", k=1, record_gates=True, output_type="pil", negative_prompt="red")
    path = save_picture(found.images[0], tmp_path / "a.png", found.record())
    again = auto("a dog", k=1, record_gates=True, output_type="pil", negative_prompt="red")
    other = save_picture(again.images[0], tmp_path / "b.png", again.record())
    assert path.read_bytes() == other.read_bytes()
    assert '"negative_prompt": "red"' in path.with_suffix(".json").read_text()
    assert (found.record()["guidance"], found.record()["steps"]) == (1.5, STEPS)


def test_faults_are_one_line(auto, base, library, one_line):
    call = partial(one_line, GatesError, auto)
    assert "the prompt is empty" in call(" ")
    assert "k=0 adapters are wanted" in call("a", k=0)
    assert "no adapter is named 'z'" in call("a", k=1, strengths={"z": 1.0})
    assert "mode is 'best'" in call("a", mode="best")
    assert "leave generator and latents out" in call("a", generator=1)
    assert "is for sd3" in call("a", adapters=["sd3-style"])
    assert "k=9, but a gate opens at most 8" in call("a", k=9, mode="relevance")
    assert "needs a file that was trained" in call("a", adapters=["first"], mode="relevance")
    library.adapters = {"sd3-style": library.adapters["sd3-style"]}
    assert "no adapter of the library fits the model: adapter 'sd3-style'" in call("a")
    library.adapters = {}
    assert "the search found none of this base; give the base" in call("a")
    alone = AutoLoraPipeline(base.pipeline())
    assert "there is no library" in one_line(GatesError, alone, "a")
    assert "there is no library" in one_line(GatesError, alone, "a", adapters=["first"])


@pytest.fixture
def sd3():
    torch.manual_seed(0)
    transformer = SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, num_layers=2, attention_head_dim=8,
        num_attention_heads=4, joint_attention_dim=32, caption_projection_dim=32,
        pooled_projection_dim=24, out_channels=4, pos_embed_max_size=8,
    )  # fmt: skip
    vae = AutoencoderKL(
        latent_channels=4, block_out_channels=(8,), norm_num_groups=2, sample_size=8
    )
    pipe = StableDiffusion3Pipeline(
        transformer=transformer.eval().requires_grad_(False), vae=vae.eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(),
        text_encoder=None, tokenizer=None, text_encoder_2=None, tokenizer_2=None,
        text_encoder_3=None, tokenizer_3=None,
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    return pipe


class Words:
    """States of any caption for a small SD3."""

    def encode(self, captions):
        draw = torch.Generator().manual_seed(len(captions[0]))
        tokens = torch.randn(1, 5, 32, generator=draw)
        return SimpleNamespace(tokens=tokens, pooled=torch.randn(1, 24, generator=draw))


def test_sd3_runs_end_to_end_and_neutral_gates_are_merged_weights(sd3):
    model = sd3.transformer
    adapters = {
        "a": random_adapter(model, 1, family="sd3", size=0.3),
        "b": random_adapter(model, 2, family="sd3", where="attn"),
    }
    auto = AutoLoraPipeline(
        sd3, text=Words(), height=8, width=8, num_inference_steps=2, output_type="latent"
    )
    found = auto("a dog", adapters=adapters, record_gates=True)
    assert found.gates.means.shape[0] == 2
    assert any("qkv" in site for site in found.gates.sites)
    merged = deepcopy(model)
    for bundle in adapters.values():
        for name in bundle.modules:
            merged.get_submodule(name).weight += bundle.delta_weight(name)
    plain = auto("a dog", adapters={}).images
    sd3.transformer = merged
    expected = AutoLoraPipeline(
        sd3, text=Words(), height=8, width=8, num_inference_steps=2, output_type="latent"
    )("a dog", adapters={}).images
    assert_close(found.images, expected, rtol=1e-4, atol=1e-4)
    assert (plain - expected).abs().max() > 1e-2
