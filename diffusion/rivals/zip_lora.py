"""Two adapters with a learned factor for every column of their changes (ZipLoRA)."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from core_gates.adapters import GatedLoraLinear, LowRank, OpenGate
from core_gates.errors import GatesError
from diffusion.fusion.fusion_tasks import FusionTask
from diffusion.fusion.gate_file import DOT
from diffusion.fusion.protocol import Adapters, by_name, modules_of, plain_factors, stacked
from diffusion.lora_file import Factors, LoraBundle
from diffusion.lora_file.family import Placed
from diffusion.models.flow_matching import Noised, flow_matching_losses, noised, velocity
from diffusion.models.text_encoders import TextStates
from diffusion.rivals.weighing import Sum, Weighing
from diffusion.rivals.x_lora import owners, refuse_magnitudes


class ColumnWeightedLora(GatedLoraLinear):
    """Add the outputs of adapters, whose inputs are weighed by feature.

    Args:
        base: The layer.
        adapters: Its adapters, in order; rank 0 where one does nothing.
        columns: Factors of the inputs of each adapter (K, D), which stay outside of this module.
    """

    owners: Tensor

    def __init__(self, base: nn.Module, adapters: Sequence[LowRank], columns: Tensor) -> None:
        super().__init__(base, adapters, gate=OpenGate(cast(int, base.out_features)))
        self._columns = (columns,)

    def set_adapters(self, adapters: Sequence[LowRank]) -> None:
        """Exchange the adapters.

        Raises:
            ValueError: The factors of one do not fit the layer.
        """
        super().set_adapters(adapters)
        self.owners = owners([adapter.rank for adapter in adapters])

    def _hidden(self, x: Tensor, ranks: Sequence[int]) -> Tensor:
        columns = self._columns[0][self.owners].to(x.device, x.dtype)
        strengths = self.strengths.to(x.device, x.dtype)[owners(ranks)]
        return F.linear(x, self.down.to(x.device, x.dtype) * columns) * strengths


class ZipLora(Weighing):
    """ZipLoRA (Shah et al., 2023): weigh the columns of both ΔW so that they do not interfere.

    In every layer ``ΔW = ΔW_1 diag(m_1) + ΔW_2 diag(m_2)`` with vectors ``m`` over the inputs, 1 at
    the start. The paper trains them to reproduce what each adapter predicts alone for its own
    prompt, plus ``λ`` times :meth:`penalty`, as :func:`diffusion.rivals.zip_lora.distill` does.
    They are learned for one pair, which it has to see.

    Args:
        model: See :class:`diffusion.fusion.GatedFusion`.
        adapters: Name -> adapter, two of them, no DoRA.

    Raises:
        GatesError: There are not two adapters, or one does not fit the model.
    """

    penalty_weight = 0.01
    """λ of the paper."""

    def __init__(self, model: nn.Module, adapters: Mapping[str, LoraBundle]) -> None:
        _refuse_others(adapters)
        super().__init__(model, adapters)
        refuse_magnitudes(adapters)
        self.columns = nn.ParameterDict(
            {
                site.name.replace(".", DOT): nn.Parameter(torch.ones(2, site.in_features))
                for site in self.sites
            }
        )

    def set_adapters(self, adapters: Adapters) -> None:
        """Exchange the two adapters; what was learned stays, strengths are 1 again.

        Raises:
            GatesError: There are not two, or one does not fit the model or changes other layers.
        """
        adapters = by_name(adapters)
        _refuse_others(adapters)
        for module in modules_of(adapters):
            plain_factors(adapters, module)
            if module.replace(".", DOT) not in self.columns:
                raise GatesError(f"nothing is learned for {module}: make another for these two")
        super().set_adapters(adapters)

    def penalty(self) -> Tensor:
        """Return the sum of ``|cos(m_1, m_2)|`` over the layers that both adapters change.

        The paper writes the dot product of the vectors and calls it their cosine similarity; unlike
        that, the cosine does not fall when both vectors shrink.
        """
        shared = set.intersection(*(set(bundle.modules) for bundle in self.adapters.values()))
        vectors = [self.columns[module.replace(".", DOT)] for module in sorted(shared)]
        if not vectors:
            return torch.zeros(())
        cosines = [F.cosine_similarity(pair[0], pair[1], dim=0).abs() for pair in vectors]
        return torch.stack(cosines).sum()

    @property
    @torch.no_grad()
    def bundle(self) -> LoraBundle:
        """One static adapter that does the same, strengths included."""
        modules = {}
        for module in modules_of(self.adapters):
            found = plain_factors(self.adapters, module)
            columns = dict(zip(self.adapters, self.columns[module.replace(".", DOT)], strict=True))
            parts = [
                Factors(one.down * columns[name].cpu().to(one.down.dtype), one.up, one.scale)
                for name, one in found.items()
            ]
            modules[module] = stacked(parts, [self.strengths[name] for name in found])
        return LoraBundle(next(iter(self.adapters.values())).family, modules)

    def _adapted(self, linear: nn.Linear, site: Placed) -> GatedLoraLinear:
        columns = self.columns[site.name.replace(".", DOT)]
        return ColumnWeightedLora(linear, self._factors(site), columns)


def _refuse_others(adapters: Mapping[str, LoraBundle]) -> None:
    if len(adapters) != 2:
        raise GatesError(f"ZipLoRA is for two adapters, found {len(adapters)}: give two")


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
