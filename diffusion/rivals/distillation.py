"""How ZipLoRA is fitted to two adapters: by what each of them predicts alone."""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from core_gates.errors import GatesError
from diffusion.fusion.fusion_tasks import FusionTask
from diffusion.models.flow_matching import Noised, flow_matching_losses, noised, velocity
from diffusion.models.text_encoders import TextStates
from diffusion.rivals.weighing import Sum
from diffusion.rivals.zip_lora import ZipLora

BATCH = 64  # latents at a time where an adapter predicts alone


class Taught(NamedTuple):
    """Noised latents with what each adapter alone predicts for its own.

    Attributes:
        at: (K, N, ...) ``x`` and ``t``, and as ``target`` the prediction of the adapter.
        text: Of their captions, (K, N, ...).
    """

    at: Noised
    text: TextStates


def taught(rival: ZipLora, seen: Mapping[str, FusionTask], draws: int, *, seed: int = 0) -> Taught:
    """Return what each adapter alone predicts for its images at random times.

    All images of an adapter are drawn equally often, at times whose logits are normal.

    Args:
        rival: The adapters, not attached.
        seen: Name of each adapter -> images of its concept with their captions.
        draws: Noised latents of each adapter.
        seed: Of times and noise.

    Raises:
        GatesError: An adapter has no images, the rival is attached, or there are no draws.
    """
    if lacking := [name for name in rival.adapters if name not in seen]:
        raise GatesError(f"adapter {lacking[0]!r} has no images that it could teach: give some")
    if rival.attached or draws < 1:
        what = f"found {draws} draws" if draws < 1 else "the adapters are attached"
        raise GatesError(f"{what}: detach them, and give each at least one draw")
    draw = torch.Generator().manual_seed(seed)
    found = [_alone(rival, name, seen[name], draws, draw) for name in rival.adapters]
    ats, texts = zip(*found, strict=True)
    return Taught(
        Noised(*map(torch.stack, zip(*ats, strict=True))),
        TextStates(*map(torch.stack, zip(*texts, strict=True))),
    )


def distill(
    rival: ZipLora,
    examples: Taught,
    *,
    steps: int,
    batch_size: int = 4,
    learning_rate: float = 0.01,
) -> list[float]:
    """Fit the columns of a ZipLoRA by the published loss, with Adam at a constant rate.

    That is ``Σ_k |v(x_k; both) - v(x_k; k alone)|²``, means over latents and their entries, plus
    ``λ`` times :meth:`ZipLora.penalty`. Steps go through the examples in order, again and again.
    The model is frozen from then on.

    Args:
        rival: Is fitted in place; attached here alone.
        examples: See :func:`taught`.
        steps: Of Adam; the paper takes 100.
        batch_size: Examples of each adapter in a step.
        learning_rate: Of Adam; that of the paper.

    Returns:
        Objective of each step, before it is taken.

    Raises:
        GatesError: The rival is attached, there is no step, or an objective is not finite.
    """
    if steps < 1 or batch_size < 1:
        raise GatesError(f"found {steps} steps of {batch_size} examples: both must be positive")
    draws, found = examples.at.t.shape[1], list[float]()
    optimizer = torch.optim.Adam(rival.parameters(), learning_rate)
    rival.model.requires_grad_(False)
    with rival:
        for step in range(steps):
            rows = torch.arange(step * batch_size, (step + 1) * batch_size) % draws
            value = objective(rival, examples, rows)
            found.append(float(value.detach()))
            if not value.isfinite():
                raise GatesError(
                    f"the objective is {found[-1]} at step {step}: lower the learning rate, now"
                    f" {learning_rate}"
                )
            optimizer.zero_grad()
            value.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    return found


def objective(rival: ZipLora, examples: Taught, rows: Tensor | slice = slice(None)) -> Tensor:
    """Return the published loss of an attached ZipLoRA for some examples of each adapter."""
    at = Noised(*(part[:, rows].flatten(0, 1) for part in examples.at))
    text = TextStates(*(part[:, rows].flatten(0, 1) for part in examples.text))
    errors = flow_matching_losses(rival.model, at, text).view(len(rival.adapters), -1)
    return errors.mean(1).sum() + rival.penalty_weight * rival.penalty()


@torch.no_grad()
def _alone(
    rival: ZipLora, name: str, task: FusionTask, draws: int, draw: torch.Generator
) -> tuple[Noised, TextStates]:
    """Return noised latents of an adapter with what it predicts without the other one."""
    rows = torch.arange(draws) % len(task.latents)
    latents, text = task.latents[rows], task.text.of(rows)
    t = torch.randn(draws, generator=draw).sigmoid().to(latents)
    at = noised(latents, t, torch.randn(latents.shape, generator=draw).to(latents))
    with Sum(rival.model, {name: rival.adapters[name]}):
        parts = [
            velocity(rival.model, at.x[some], at.t[some], text.of(some))
            for some in torch.arange(draws).split(BATCH)
        ]
    return at._replace(target=torch.cat(parts)), text
