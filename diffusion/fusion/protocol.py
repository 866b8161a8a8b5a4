"""What every way to use several adapters at once offers, gated or not, on any model."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from itertools import chain, count
from types import TracebackType
from typing import Self

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from core_gates.errors import GatesError, check_option
from core_gates.numerics import accumulation_dtype
from diffusion.lora_file import Factors, LoraBundle
from diffusion.lora_file.family import FAMILIES, Placed, index_of, place
from diffusion.lora_file.inspection import describe
from diffusion.lora_file.names import UNETS


class Fusion(ABC):
    """Adapters of a model, in force while attached.

    The model keeps its own layers, the same objects with the same bits, after `detach` and
    after an error inside a ``with`` block. Fusions are modules whose parameters are what is
    trained, if anything is.

    Attributes:
        adapters: Name -> adapter, in order.
        strengths: Name -> factor of what the adapter does; 0 is off.
    """

    adapters: dict[str, LoraBundle]
    strengths: dict[str, float]

    @property
    @abstractmethod
    def model(self) -> nn.Module:
        """The model; it is not a part of this module."""

    @property
    @abstractmethod
    def attached(self) -> bool:
        """Whether the adapters are in force."""

    @abstractmethod
    def attach(self) -> Self:
        """Put the adapters in force.

        Raises:
            GatesError: They are, or the model has others.
        """

    @abstractmethod
    def detach(self) -> None:
        """Leave the model as it was."""

    def __enter__(self) -> Self:
        """Attach."""
        return self.attach()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Detach, whatever happened."""
        self.detach()

    @abstractmethod
    def set_adapters(self, adapters: Mapping[str, LoraBundle]) -> None:
        """Exchange the adapters for others; strengths are 1 again.

        Raises:
            GatesError: They do not fit; the old ones stay.
        """

    @abstractmethod
    def set_strengths(self, strengths: Mapping[str, float]) -> None:
        """Weigh adapters; others keep their strength.

        Raises:
            GatesError: There is no adapter of a name, or a strength is not finite.
        """

    def describe(  # noqa: B027 (nothing depends on it as a rule)
        self,
        *,
        roles: Mapping[str, str] | None = None,
        scores: Mapping[str, float] | None = None,
    ) -> None:
        """Set roles of adapters and their scores for the prompt; exchanging adapters clears both.

        Args:
            roles: Name -> one of `ROLES`.
            scores: Name -> such as the cosine of the adapter with the prompt.

        Raises:
            GatesError: There is no adapter of a name, no such role, or a score is not finite.
        """

    def at(self, step: int, steps: int) -> None:  # noqa: B027 (likewise)
        """Learn which denoising step follows.

        A pipeline calls this before each step, such as from ``callback_on_step_end`` with the
        number of the next one. Where it is never called, the run has one step.

        Args:
            step: Its number, from 0.
            steps: Number of steps of the run.
        """


Adapters = Mapping[str, LoraBundle] | Sequence[LoraBundle]
"""Name -> adapter, or adapters that are named by their files."""


def by_name(adapters: Adapters) -> dict[str, LoraBundle]:
    """Return adapters by name, in the order that they are given in.

    An adapter of a list is called like its file, without the suffix; one that was not read from a
    file like its title, else ``adapter``. A name that is taken is numbered: ``style``, ``style-2``.

    Args:
        adapters: A mapping is copied as it is.

    Raises:
        GatesError: Something else than an adapter is given, such as the path of its file, or one
            adapter twice.
    """
    if isinstance(adapters, LoraBundle | str):
        raise GatesError(f"{_seen(adapters)} is given, expected a list or a mapping of adapters")
    if isinstance(adapters, Mapping):
        given = dict(adapters)
    else:
        bundles = list(adapters)
        if len({id(one) for one in bundles}) < len(bundles):
            raise GatesError(
                "an adapter is given twice: give it once, and weigh it by its strength"
            )
        given = {}
        for one in bundles:
            given[_free(_called(one), given)] = one
    for name, one in given.items():
        if not isinstance(one, LoraBundle):
            raise GatesError(f"adapter {name!r} is {_seen(one)}: read its file by load_lora first")
    return given


def _called(one: object) -> str:
    title = describe(one.metadata).title if isinstance(one, LoraBundle) and not one.name else ""
    return getattr(one, "name", "") or title or "adapter"


def _free(name: str, taken: Mapping[str, LoraBundle]) -> str:
    names = chain([name], (f"{name}-{number}" for number in count(2)))
    return next(one for one in names if one not in taken)


def _seen(given: object) -> str:
    return repr(given) if isinstance(given, str) else f"a {type(given).__name__}"


KINDS = {"FluxTransformer2DModel": "flux", "SD3Transformer2DModel": "sd3"}
"""Class of a model of diffusers -> its family."""

TIME_SCALES = {"flux": 1000.0, "sd3": 1.0}
"""Times of gates, from 0 to 1000, by those that models of a family are called with."""


def uncompiled(model: nn.Module) -> nn.Module:
    """Return the model that ``torch.compile`` was given, whose layers the compiled one shares."""
    found = getattr(model, "_orig_mod", model)
    return found if isinstance(found, nn.Module) else model


def family_of(model: nn.Module) -> str | None:
    """Return the family of a model; None for any other, whose layers have a gate each."""
    return next((KINDS[c.__name__] for c in type(model).__mro__ if c.__name__ in KINDS), None)


def linear_sizes(model: nn.Module) -> dict[str, tuple[int, int]]:
    """Return the inputs and outputs of every linear layer of a model, by name.

    Raises:
        GatesError: PEFT has put adapters onto one.
    """
    found = {
        name: (module.in_features, module.out_features)
        for name, module in model.named_modules()
        if name
        and isinstance(module, nn.Linear)
        and not isinstance(module, NonDynamicallyQuantizableLinear)
    }
    if wrapped := next((name for name in found if name.endswith(".base_layer")), ""):
        raise GatesError(
            f"{wrapped.removesuffix('.base_layer')} has adapters of PEFT: take them off first, as"
            " by unload_lora_weights() of the pipeline, and give their files as adapters"
        )
    return found


def sites_of(model: nn.Module, family: str | None) -> list[Placed]:
    """Return where a gate belongs, in the order of the published encoder, then the other layers.

    Args:
        model: The model, without adapters.
        family: ``flux``, ``sd3``, or None: every layer is alone.
    """
    sizes = linear_sizes(model)
    fused = [] if family is None else place(FAMILIES[family], _blocks(family, sizes), sizes)
    taken = {part for site in fused for part in site.parts}
    alone = [
        Placed(name, name, (name,), inputs, (outputs,))
        for name, (inputs, outputs) in sizes.items()
        if name not in taken
    ]
    return [*fused, *alone]


def with_strengths(
    strengths: Mapping[str, float], changes: Mapping[str, float]
) -> dict[str, float]:
    """Return the strengths of adapters after some were changed.

    Raises:
        GatesError: There is no adapter of a name, or a strength is not finite.
    """
    if unknown := sorted(changes.keys() - strengths.keys()):
        raise GatesError(f"no adapter is named {unknown[0]!r}; there are {', '.join(strengths)}")
    found = {**strengths, **{name: float(value) for name, value in changes.items()}}
    if not torch.tensor(list(found.values())).isfinite().all():
        raise GatesError(f"strengths {dict(changes)} must be finite numbers")
    return found


ROLES = ("any", "subject", "style")
"""What an adapter may be for; the first is unknown, or none of the others."""


def role_of(bundle: LoraBundle) -> str:
    """Return the role of an adapter: the first that its tags name."""
    tags = [tag.strip().lower() for tag in describe(bundle.metadata).tags]
    return next((tag for tag in tags if tag in ROLES[1:]), ROLES[0])


def with_roles(roles: Mapping[str, str], changes: Mapping[str, str]) -> dict[str, str]:
    """Return the roles of adapters after some were changed.

    Raises:
        GatesError: There is no adapter of a name, or no such role.
    """
    if unknown := sorted(changes.keys() - roles.keys()):
        raise GatesError(f"no adapter is named {unknown[0]!r}; there are {', '.join(roles)}")
    for name, role in changes.items():
        check_option(f"the role of {name}", role, ROLES, GatesError)
    return {**roles, **changes}


def refuse_misfits(
    adapters: Mapping[str, LoraBundle], family: str | None, sizes: Mapping[str, tuple[int, int]]
) -> None:
    """Refuse adapters of other models.

    Args:
        adapters: Name -> adapter.
        family: That of the model, None for any.
        sizes: Inputs and outputs of its linear layers.

    Raises:
        GatesError: An adapter is of another family, or has a layer that the model lacks.
    """
    for name, bundle in adapters.items():
        if family is not None and bundle.family != family:
            raise GatesError(f"adapter {name!r} is for {bundle.family}, the model is {family}")
        for module, found in bundle.sizes().items():
            if sizes.get(module) != (found.in_features, found.out_features):
                has = sizes.get(module)
                raise GatesError(
                    f"adapter {name!r} changes {module} of {found.in_features} to"
                    f" {found.out_features} features, the model has"
                    f" {'none' if has is None else f'{has[0]} to {has[1]}'}"
                )


def _blocks(family: str, sizes: dict[str, tuple[int, int]]) -> dict[str, int]:
    """Return the number of blocks of a model, by the first part of the fused names."""
    counts: dict[str, int] = {}
    for layer in FAMILIES[family].fused:
        prefix, start = layer.name.partition(".")[0], layer.parts[0].partition("{i}")[0]
        found = [index_of(name) for name in sizes if name.startswith(start)]
        counts[prefix] = max((index + 1 for index in found if index is not None), default=0)
    return counts


Weight = float | Tensor
"""Factor of the output of an adapter: a number, or one for each output (out_features,)."""


def one_family(adapters: Mapping[str, LoraBundle]) -> str:
    """Return the family of adapters.

    Raises:
        GatesError: There are none, or they are of several.
    """
    families = {bundle.family: name for name, bundle in adapters.items()}
    if {"unet"} < families.keys() <= set(UNETS):
        del families["unet"]
    if len(families) != 1:
        found = ", ".join(f"{name!r} for {family}" for family, name in families.items())
        raise GatesError(
            f"found {found or 'no adapter'}; one adapter is made of those of one family: give them"
        )
    return next(iter(families))


def modules_of(adapters: Mapping[str, LoraBundle]) -> list[str]:
    """Return the layers that an adapter changes, each once, in a fixed order."""
    return sorted({module for bundle in adapters.values() for module in bundle.modules})


def plain_factors(adapters: Mapping[str, LoraBundle], module: str) -> dict[str, Factors]:
    """Return the low-rank factors that each adapter adds to the weight of a layer, by adapter.

    Args:
        adapters: Name -> adapter.
        module: diffusers name of the layer.

    Raises:
        GatesError: One is a DoRA, whose change no factors alone describe, or sizes differ.
    """
    found = {n: b.modules[module] for n, b in adapters.items() if module in b.modules}
    for name, factors in found.items():
        if factors.magnitude is not None:
            raise GatesError(
                f"adapter {name!r} is a DoRA at {module}, whose change depends on the base, and"
                " cannot be merged: leave it out"
            )
    kernels = {f.kernel or (1, 1): name for name, f in found.items()}
    if len(kernels) > 1:
        text = ", ".join(f"{'x'.join(map(str, k))} in {name!r}" for k, name in kernels.items())
        raise GatesError(f"kernels of {module} are unequal: {text}; merge adapters of one model")
    sizes = {(f.in_features, f.out_features): name for name, f in found.items()}
    if len(sizes) > 1:
        text = ", ".join(f"{i} to {o} features in {n!r}" for (i, o), n in sizes.items())
        raise GatesError(f"adapters are of unlike models: {module} has {text}")
    return found


def stacked(factors: Sequence[Factors], weights: Sequence[Weight]) -> Factors:
    """Return the weighted sum of the changes of a layer, exactly; ranks add up.

    Args:
        factors: Of each adapter.
        weights: Of each adapter, for all outputs or for each.
    """
    dtype = accumulation_dtype(*(f.up for f in factors))
    ups = []
    for one, weight in zip(factors, weights, strict=True):
        rows = torch.as_tensor(weight, dtype=dtype).reshape(-1, 1).to(one.up.device)
        ups.append(one.scale * rows * one.up.to(dtype))
    kernel = next((f.kernel for f in factors if f.kernel), None)
    down = torch.cat([f.down.to(dtype) for f in factors])
    return Factors(down, torch.cat(ups, 1), kernel=kernel)


def weighted_sum(
    adapters: Mapping[str, LoraBundle], weights: Mapping[str, float] | None = None
) -> LoraBundle:
    """Return the adapter that does what all do at once; ranks add up.

    Parts for text encoders are left out.

    Args:
        adapters: Name -> adapter.
        weights: Name -> factor; 1 for all by default.

    Raises:
        GatesError: There is no adapter, or they do not fit each other.
    """
    family, modules = one_family(adapters), {}
    for module in modules_of(adapters):
        found = plain_factors(adapters, module)
        given = [1.0 if weights is None else weights[name] for name in found]
        modules[module] = stacked(list(found.values()), given)
    return LoraBundle(family, modules)
