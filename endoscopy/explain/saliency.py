"""What a network attends to: Grad-CAM, attention roll-out, overlays, bars of gate scores."""

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image
from scipy import ndimage
from torch import Tensor, nn
from torch.nn import functional as F

from core_gates.errors import GatesError
from endoscopy.bundles.sizing_bundle import SizingBundle
from endoscopy.data.images import Frame, resize_frame
from endoscopy.inputs.image_files import BLACK, LUMA
from endoscopy.models.sizer import MultiStreamSizer
from harness.figures.style import BLUE, GRID, INK, MUTED, ORANGE, TEXT_SIZE, new_figure, place


def grad_cam(
    model: MultiStreamSizer,
    streams: Mapping[str, Tensor],
    geometry: Tensor | None = None,
    *,
    stream: str | None = None,
) -> Tensor:
    """Return where a network sees evidence for a larger lesion.

    ``relu(Σ_c mean(∂ŷ/∂A_c) A_c)`` with the maps A of the last stage and the first output ŷ
    (Selvaraju et al., 2017), enlarged to the frame.

    Args:
        model: A network of ResNets, for evaluation.
        streams: Normalized images (B, C, H, W) by name.
        geometry: Of the boxes (B, 4), if the network reads it.
        stream: Whose branch to look at; the first by default.

    Returns:
        (B, H, W) in [0, 1], the largest value of each frame 1 unless it is 0 throughout.

    Raises:
        GatesError: The branch has no convolutional stages, or does not exist.
    """
    name, trunk = _branch(model, stream)
    stages = [
        module
        for key, module in trunk.named_children()
        if key.startswith("layer") and isinstance(module, nn.Sequential)
    ]
    if not stages:
        raise GatesError(
            f"Grad-CAM needs the stages of a ResNet, which stream {name!r} has not; use attention "
            "roll-out for a transformer"
        )
    held: list[Tensor] = []
    handle = stages[-1].register_forward_hook(lambda _module, _inputs, out: held.append(out))
    try:
        with torch.enable_grad():
            inputs = {key: value.detach() for key, value in streams.items()}
            inputs[name] = inputs[name].clone().requires_grad_()  # even if no weight does
            score = model(inputs, geometry)[:, 0].sum()
            maps = held[0]
            (gradient,) = torch.autograd.grad(score, maps)
    finally:
        handle.remove()
    weights = gradient.mean((2, 3), keepdim=True)
    heat = F.relu((weights * maps).sum(1, keepdim=True)).detach()
    heat = F.interpolate(heat, streams[name].shape[2:], mode="bilinear")[:, 0]
    return heat / heat.amax((1, 2), keepdim=True).clamp(min=1e-12)


def attention_rollout(
    model: MultiStreamSizer,
    streams: Mapping[str, Tensor],
    geometry: Tensor | None = None,
    *,
    stream: str | None = None,
) -> Tensor:
    """Return to what extent each patch reaches the token that the head reads.

    The product over the blocks of ``(A + I) / 2``, A the attention averaged over heads (Abnar and
    Zuidema, 2020), read at the class token, or averaged over tokens where there is none. Shown is
    the excess of a patch over uniform attention, in units of the latter or of the largest excess,
    whichever is larger: uniform attention is 0.

    Args:
        model: A network of plain ViTs, for evaluation.
        streams: Normalized images (B, C, H, W) by name.
        geometry: Of the boxes (B, 4), if the network reads it.
        stream: Whose branch to look at; the first by default.

    Returns:
        (B, H, W) in [0, 1].

    Raises:
        GatesError: The branch is not a plain ViT, or does not exist.
    """
    name, trunk = _branch(model, stream)
    _require_vit(name, trunk)
    maps: list[Tensor] = []
    handles = [
        block.attn.register_forward_pre_hook(
            lambda attention, inputs: maps.append(attention_weights(attention, inputs[0]))
        )
        for block in trunk.blocks
    ]
    try:
        with torch.no_grad():
            model(streams, geometry)
    finally:
        for handle in handles:
            handle.remove()
    joined = torch.eye(maps[0].shape[-1], dtype=maps[0].dtype, device=maps[0].device)
    for weights in maps:
        joined = (0.5 * weights + 0.5 * torch.eye(weights.shape[-1]).to(weights)) @ joined
    prefix = int(trunk.num_prefix_tokens)
    read = joined[:, 0] if trunk.cls_token is not None else joined[:, prefix:].mean(1)
    shares = read[:, prefix:] / read[:, prefix:].sum(1, keepdim=True)
    excess = (shares * shares.shape[1] - 1).clamp(min=0)
    excess = excess / excess.amax(1, keepdim=True).clamp(min=1)
    heat = excess.reshape(-1, 1, *trunk.patch_embed.grid_size)
    return F.interpolate(heat, streams[name].shape[2:], mode="bilinear")[:, 0]


def attention_weights(attention: Any, x: Tensor) -> Tensor:
    """Return the attention (B, N, N) of a timm attention on tokens (B, N, D), mean over heads."""
    batch, tokens, _ = x.shape
    qkv = attention.qkv(x).reshape(batch, tokens, 3, attention.num_heads, -1)
    query, key, _ = qkv.permute(2, 0, 3, 1, 4)
    logits = attention.q_norm(query) * attention.scale @ attention.k_norm(key).transpose(-2, -1)
    return logits.softmax(-1).mean(1)


def _branch(model: MultiStreamSizer, stream: str | None) -> tuple[str, Any]:
    """Return the name and the trunk of a stream, the first one by default."""
    name = stream or next(iter(model.branches))
    if name not in model.branches:
        branches = ", ".join(model.branches)
        raise GatesError(f"the network has no stream {name!r}; choose one of {branches}")
    return name, model.branches[name]


def _require_vit(name: str, trunk: nn.Module) -> None:
    blocks = getattr(trunk, "blocks", None)
    plain = isinstance(blocks, nn.Sequential) and all(
        hasattr(getattr(block, "attn", None), "qkv") for block in blocks
    )
    if not plain or not hasattr(trunk, "num_prefix_tokens"):
        raise GatesError(
            f"attention roll-out needs a plain ViT, which stream {name!r} is not; use Grad-CAM for "
            "a ResNet"
        )


GRAD_CAM, ROLLOUT = "Grad-CAM", "attention roll-out"


def attention_maps(bundle: SizingBundle, frames: Sequence[Frame]) -> tuple[np.ndarray, str] | None:
    """Return Grad-CAM of a ResNet or the attention roll-out of a ViT.

    Args:
        bundle: Trained network.
        frames: N frames of any size.

    Returns:
        (N, S, S) float32 in [0, 1] and its name, 0 in black corners; None for networks that have
        neither.
    """
    streams, geometry = bundle.inputs(frames)
    for method, name in ((grad_cam, GRAD_CAM), (attention_rollout, ROLLOUT)):
        try:
            maps = method(bundle.model, streams, geometry).detach().float().cpu().numpy()
        except GatesError:
            continue
        images = (resize_frame(frame, bundle.image_size).image for frame in frames)
        return np.stack([inside(*pair) for pair in zip(maps, images, strict=True)]), name
    return None


def inside(heat: np.ndarray, image: np.ndarray) -> np.ndarray:
    """Return a map that is zero outside the round field of view of an endoscope.

    The black corners show nothing, but coarse maps reach into them. Dark regions that are not
    connected with a corner, such as the lumen, keep their values.

    Args:
        heat: (H, W) in [0, 1].
        image: (H, W, 3) uint8.

    Returns:
        (H, W), 0 outside; the largest value is 1 unless it is 0 throughout.
    """
    regions, _ = ndimage.label(image @ LUMA <= BLACK)
    corners = {int(regions[y, x]) for y in (0, -1) for x in (0, -1)} - {0}
    kept = np.where(np.isin(regions, list(corners)), 0, heat).astype(np.float32)
    return kept / max(float(kept.max()), 1e-12)


FRAME = 1.55  # inches


def overlay(image: np.ndarray, heat: np.ndarray, strength: float = 0.6) -> np.ndarray:
    """Overlay a map on a frame, opaque in proportion to its values.

    Args:
        image: (H, W, 3) uint8.
        heat: (h, w) in [0, 1]; is enlarged to the frame.
        strength: Opacity where the map is 1.

    Returns:
        (H, W, 3) uint8.
    """
    height, width = image.shape[:2]
    scaled = Image.fromarray(np.clip(heat, 0, 1).astype(np.float32))
    large = np.asarray(scaled.resize((width, height), Image.Resampling.BILINEAR))
    colors = mpl.colormaps["inferno"](large)[..., :3]
    opacity = strength * large[..., None]
    mixed = (1 - opacity) * image / 255.0 + opacity * colors
    return np.rint(255 * mixed).astype(np.uint8)


def attention_figure(
    images: Sequence[np.ndarray],
    heats: Sequence[np.ndarray],
    *,
    captions: Sequence[str] = (),
    title: str = "What the network looks at",
) -> Figure:
    """Draw frames above their overlays.

    Args:
        images: Frames (H, W, 3) uint8.
        heats: A map (h, w) in [0, 1] for each.
        captions: A line for each frame.
        title: Heading.

    Raises:
        ValueError: There is no frame, or not one map per frame.
    """
    if not images or len(images) != len(heats):
        raise ValueError(f"found {len(images)} frames and {len(heats)} maps, expected one each")
    gap = 0.08
    width, height = 0.4 + len(images) * (FRAME + gap), 2 * FRAME + 1.05
    figure = new_figure(max(width, 3.6), height)
    figure.text(0.2 / figure.get_figwidth(), 1 - 0.25 / height, title, fontsize=12,
                fontweight="bold", color=INK, va="center")  # fmt: skip
    for column, (image, heat) in enumerate(zip(images, heats, strict=True)):
        left = 0.2 + column * (FRAME + gap)
        for row, picture in enumerate((overlay(image, heat), image)):
            axes = place(figure, left, 0.35 + row * (FRAME + gap), FRAME, FRAME)
            axes.imshow(picture, interpolation="nearest")
            axes.set_axis_off()
        if column < len(captions):
            axes.set_title(captions[column], fontsize=TEXT_SIZE - 1, color=INK, pad=3, loc="left")
    figure.text(
        0.2 / figure.get_figwidth(), 0.16 / height, "above: frame; below: with the map",
        fontsize=TEXT_SIZE - 1.5, color=MUTED, va="center",
    )  # fmt: skip
    return figure


COLUMNS = 4
WIDTH, HEIGHT = 2.05, 1.0  # inches of a panel
NEARLY_CLOSED = 0.1


def gate_figure(scores: Mapping[str, Tensor], *, title: str = "Gates") -> Figure:
    """Draw the scores of every gate, sorted in descending order.

    A line marks 0.5, where sigmoid gates start; bars below 0.1 are nearly closed and orange. Each
    panel states the mean and the number of nearly closed features.

    Args:
        scores: Name of the gate to its scores (C,).
        title: Heading.

    Raises:
        ValueError: There is no gate.
    """
    if not scores:
        raise ValueError("scores is empty, expected at least one gate")
    columns = min(COLUMNS, len(scores))
    rows = -(-len(scores) // columns)
    width = max(4.6, 0.5 + columns * (WIDTH + 0.25))
    height = 0.95 + rows * (HEIGHT + 0.5)
    figure = new_figure(width, height)
    figure.text(0.45 / width, 1 - 0.28 / height, title, fontsize=13, fontweight="bold", color=INK,
                va="center")  # fmt: skip
    top = max(1.0, *(float(values.detach().max()) for values in scores.values()))
    for position, (name, values) in enumerate(scores.items()):
        row, column = divmod(position, columns)
        left = 0.45 + column * (WIDTH + 0.25)
        bottom = height - 0.9 - row * (HEIGHT + 0.5) - HEIGHT
        axes = place(figure, left, bottom, WIDTH, HEIGHT)
        _bars(axes, name, values.detach().float().cpu().numpy(), top, first=column == 0)
    figure.text(
        0.45 / width, 0.16 / height, "features of each gate, sorted by score; line at 0.5",
        fontsize=TEXT_SIZE - 1, color=MUTED, va="center",
    )  # fmt: skip
    return figure


def _bars(axes: Axes, name: str, values: np.ndarray, top: float, *, first: bool) -> None:
    ordered = -np.sort(-values)
    open_, closed = ordered[ordered >= NEARLY_CLOSED], ordered[ordered < NEARLY_CLOSED]
    where = np.arange(len(ordered))
    axes.bar(where[: len(open_)], open_, width=1.0, color=BLUE, linewidth=0)
    axes.bar(where[len(open_) :], closed.clip(min=0.01), width=1.0, color=ORANGE, linewidth=0)
    axes.axhline(0.5, color=INK, linewidth=0.6)
    axes.set_xlim(-0.5, len(ordered) - 0.5)
    axes.set_ylim(0, 1.02 * top)
    axes.set_xticks([])
    axes.set_yticks([0, 0.5, 1.0], ["0", ".5", "1"] if first else ["", "", ""])
    axes.tick_params(labelsize=TEXT_SIZE - 1.5, color=GRID, labelcolor=MUTED, pad=2)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(GRID)
    note = f"mean {values.mean():.2f}" + (f", {len(closed)} closed" if len(closed) else "")
    short = name.removeprefix("branches.").removesuffix(".gate")  # what names do not share
    short = short if len(short) <= 30 else f"…{short[-29:]}"
    axes.set_title(short, loc="left", fontsize=TEXT_SIZE - 1, color=INK, pad=10)
    axes.text(0, 1.03, f"{len(ordered)} features, {note}", fontsize=TEXT_SIZE - 2.5, color=MUTED,
              transform=axes.transAxes)  # fmt: skip
