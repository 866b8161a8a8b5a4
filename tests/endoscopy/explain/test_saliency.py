"""Grad-CAM and roll-out are what their papers define."""

import numpy as np
import pytest
import torch
from torch import nn

from core_gates.errors import GatesError
from endoscopy.bundles.sizing_bundle import SizingBundle
from endoscopy.data.images import Frame
from endoscopy.explain import saliency
from endoscopy.explain.saliency import (
    attention_figure,
    attention_maps,
    attention_rollout,
    attention_weights,
    grad_cam,
    inside,
    overlay,
)
from endoscopy.models.sizer import fsg_vit, tiny_resnet, tiny_vit
from endoscopy.training.targets import LogSize


def images(count=2, size=64, channels=4):
    return torch.randn(count, channels, size, size, generator=torch.Generator().manual_seed(0))


def test_grad_cam_is_its_definition():
    model = tiny_resnet(("rgb_mask", "crop")).eval()
    model.head.fc.weight.data.abs_()
    streams = {"rgb_mask": images(), "crop": images(channels=3)}
    trunk = model.branches["crop"]
    held = {}
    trunk.layer4.register_forward_hook(lambda _m, _i, out: held.update(maps=out))
    model(streams)[:, 0].sum().backward(inputs=[held["maps"]])
    maps, gradient = held["maps"].detach(), held["maps"].grad
    expected = (gradient.mean((2, 3))[:, :, None, None] * maps).sum(1).clamp(min=0)
    expected = nn.functional.interpolate(expected[:, None], (64, 64), mode="bilinear")[:, 0]
    expected = expected / expected.amax((1, 2), keepdim=True).clamp(min=1e-12)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    torch.testing.assert_close(grad_cam(model, streams, stream="crop"), expected)
    assert expected.max() == 1


def test_attention_weights_are_those_of_timm():
    attention = fsg_vit("vit_tiny_patch16_224", trunk_options={
        "img_size": 32, "embed_dim": 16, "depth": 1, "num_heads": 1, "patch_size": 8,
    }).branches["rgb"].blocks[0].attn.eval()  # fmt: skip
    tokens = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(1))
    weights = attention_weights(attention, tokens)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 5))
    values = attention.qkv(tokens).chunk(3, -1)[2]
    torch.testing.assert_close(attention.proj(weights @ values), attention(tokens))


def test_rollout_multiplies_the_blocks_in_order(monkeypatch):
    model = tiny_vit().eval()
    generator = torch.Generator().manual_seed(2)
    chain = [torch.rand(1, 65, 65, generator=generator).softmax(-1) * 0.2 for _ in range(4)]
    for weights in chain:
        weights[:, :, 7] += 0.8
    queue = list(chain)
    monkeypatch.setattr(saliency, "attention_weights", lambda *_: queue.pop(0))
    heat = attention_rollout(model, {"rgb_mask": images(1)})
    joined = torch.eye(65)
    for weights in chain:
        joined = (weights[0] + torch.eye(65)) / 2 @ joined
    share = joined[0, 1:] / joined[0, 1:].sum()
    assert share.argmax() == 6
    excess = (64 * share - 1).clamp(min=0)
    expected = nn.functional.interpolate(
        (excess / excess.max()).reshape(1, 1, 8, 8), (64, 64), mode="bilinear"
    )
    torch.testing.assert_close(heat, expected[0])


def test_even_attention_shows_nothing():
    model = tiny_vit().eval()
    for block in model.branches["rgb_mask"].blocks:
        nn.init.zeros_(block.attn.qkv.weight)
    assert attention_rollout(model, {"rgb_mask": images()}).abs().max() < 1e-5


@pytest.mark.parametrize(
    ("refused", "words"),
    [
        (lambda: grad_cam(tiny_vit().eval(), {"rgb_mask": images()}), "use attention roll-out"),
        (
            lambda: grad_cam(tiny_resnet().eval(), {"rgb_mask": images()}, stream="depth"),
            "no stream 'depth'",
        ),
        (lambda: attention_rollout(tiny_resnet().eval(), {"rgb_mask": images()}), "use Grad-CAM"),
    ],
)
def test_networks_without_stages_or_attention_are_refused(refused, words):
    with pytest.raises(GatesError, match=words):
        refused()


@pytest.mark.fault("endoscopy C15")
def test_maps_end_where_the_view_ends():
    size = 32
    y, x = np.mgrid[:size, :size] - (size - 1) / 2
    image = np.full((size, size, 3), 120, np.uint8)
    image[y**2 + x**2 > 15**2] = 3  # the corners of the frame, not quite black
    image[13:18, 13:18] = 0  # the lumen, in the middle
    heat = np.full((size, size), 0.25, np.float32)
    heat[:4, :4] = 1.0
    shown = inside(heat, image)
    assert not shown[y**2 + x**2 > 15**2].any()
    assert (shown[y**2 + x**2 < 15**2] == 1).all()
    assert not inside(heat, np.zeros_like(image)).any()


@pytest.mark.fault("endoscopy C15")
def test_the_maps_of_a_network_are_cut_so():
    bundle = SizingBundle(tiny_resnet().eval(), LogSize(), 64)
    image = np.random.default_rng(0).integers(60, 200, (96, 96, 3)).astype(np.uint8)
    image[:40, :40] = 0
    maps, name = attention_maps(bundle, [Frame(image, (50.0, 50.0, 80.0, 80.0))])
    assert (name, maps.shape) == ("Grad-CAM", (1, 64, 64))
    assert not maps[0, :25, :25].any()


def test_an_overlay_is_opaque_in_proportion():
    frame = np.random.default_rng(0).integers(0, 256, (20, 30, 3)).astype(np.uint8)
    assert np.array_equal(overlay(frame, np.zeros((4, 4))), frame)
    full = overlay(frame, np.ones((4, 4)), strength=1.0)
    assert np.unique(full.reshape(-1, 3), axis=0).tolist() == [[252, 255, 164]]
    half = overlay(frame, np.ones((4, 4)), strength=0.5).astype(int)
    assert np.abs(half - (frame.astype(int) + full) / 2).max() <= 1
    corner = np.zeros((2, 2))
    corner[0, 0] = 1
    changed = (overlay(frame, corner) != frame).any(axis=2)
    assert changed[0, 0]
    assert not changed[-1, -1]


def test_a_figure_holds_each_frame_twice(refused):
    frame = np.zeros((20, 30, 3), dtype=np.uint8)
    figure = attention_figure([frame] * 3, [np.zeros((4, 4))] * 3, captions=["a", "b", "c"])
    assert len(figure.axes) == 6
    titles = [axes.get_title(loc="left") for axes in figure.axes]
    assert [title for title in titles if title] == ["a", "b", "c"]
    refused("expected one each", attention_figure, [frame], [], error=ValueError)
