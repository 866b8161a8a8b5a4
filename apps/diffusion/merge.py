"""``gates diffusion merge``: one adapter of several files."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from apps.diffusion.adapter_files import (
    Format,
    Numbers,
    base_of,
    named_files,
    require_place,
    roles_in,
    roles_of,
    shrunk,
    storable,
    strengths_of,
    with_names,
    write,
)
from apps.diffusion.convert import named_after, show_unused
from apps.diffusion.inspect import plain_console
from core_gates.errors import GatesError
from diffusion.fusion.protocol import one_family
from diffusion.lora_file import LoraBundle, load_lora
from diffusion.lora_file.bundle import PARTS, weighed
from diffusion.lora_file.dialects import Style, kept_metadata, own_style, refuse_unlike, style_of
from diffusion.lora_file.family import FAMILIES
from diffusion.lora_file.inspection import describe, sums_of_squares
from diffusion.lora_file.reading import Base
from harness.files import Data, require_apart

Name = Literal[
    "sum", "mean", "weighted", "cat", "svd", "linear", "ties", "dare_linear", "dare_ties",
    "magnitude_prune", "ties_svd", "dare_linear_svd", "dare_ties_svd", "magnitude_prune_svd",
    "baked", "strengths",
]  # fmt: skip
"""All methods. Sparse ones combine ΔW itself if they end with ``_svd``, else A and B; ``baked`` has
the mean gates of runs of a base, ``strengths`` trained numbers by layer."""

EXACT = ("sum", "mean", "weighted", "cat", "svd")
UNWEIGHTED = ("sum", "mean")
DENSE = (*EXACT, "linear", "baked", "strengths")


class Settings(NamedTuple):
    """What is asked for.

    Attributes:
        method: Its name.
        weights: Strength of each adapter; None if none are given.
        density: Fraction of the entries that sparse methods keep; None for their default.
        rank: Components per layer that are kept at most; None for no limit.
        seed: Of what DARE drops, and of images on which gates are observed.
        base: Folder of the base that gates are observed in.
        gates: File of trained gates or strengths.
        prompts: What the base generates while gates are observed.
        steps: Denoising steps of each image.
        roles: Of the adapters by name; empty where tags or weights tell.
    """

    method: Name
    weights: Mapping[str, float] | None = None
    density: float | None = None
    rank: int | None = None
    seed: int = 0
    base: Path | None = None
    gates: Path | None = None
    prompts: tuple[str, ...] = ()
    steps: int = 20
    roles: Mapping[str, str] = {}

    def check(self) -> None:
        """Refuse options that the method does not use, that it lacks, or whose values are wrong.

        Raises:
            GatesError: One is given, or one that it needs is not.
        """
        gates, weights, runs = self.gates, self.weights, self.method == "baked"
        learned = runs or self.method == "strengths"
        faults = {
            f"--weights has no meaning for {self.method}: choose --method weighted, or leave it"
            " out": weights is not None and self.method in UNWEIGHTED,
            "--method weighted needs --weights, such as a:0.8,b:0.5": weights is None
            and self.method == "weighted",
            f"--density has no meaning for {self.method}: leave it out": self.density is not None
            and self.method in DENSE,
            f"--rank is {self.rank}, expected 1 or more": self.rank is not None and self.rank < 1,
            f"--density is {self.density}, expected a fraction in (0, 1]": self.density is not None
            and not 0 < self.density <= 1,
            "--weights gives every adapter the strength 0: nothing is left": weights is not None
            and not any(weights.values()),
            f"--gates and --prompts have no meaning for {self.method}": (
                not learned and bool(gates)
            )
            or (not runs and bool(self.prompts)),
            "--method baked needs a base that runs with the gates: give --base FOLDER, --gates FILE"
            " and --prompts 'one; another'": runs and not (self.base and gates and self.prompts),
            "--method strengths needs --gates FILE of `train-gates --what strengths`": learned
            and gates is None,
            f"--roles has no meaning for {self.method}: leave it out": bool(self.roles)
            and not learned,
            f"{gates} does not exist: name a file of gates": gates is not None
            and not gates.is_file(),
            f"--steps is {self.steps}, expected at least one": runs and self.steps < 1,
        }
        if found := [fault for fault, wrong in faults.items() if wrong]:
            raise GatesError(found[0])

    def strengths(self, names: Mapping[str, object]) -> dict[str, float]:
        """Return the factor of each adapter."""
        equal = dict.fromkeys(names, 1 / len(names) if self.method == "mean" else 1.0)
        return equal if self.weights is None else dict(self.weights)

    def record(self, **more: Any) -> dict[str, Any]:
        """Return all options that the method has used, and more, without those that are None."""
        runs = self.base if self.method == "baked" else None
        used: dict[str, Any] = {
            "method": self.method,
            "density": self.density,
            "seed": self.seed if runs or self.method.startswith("dare") else None,
            "gates": self.gates and Data.of(self.gates.name, "gates", self.gates).state(),
            "roles": dict(self.roles) or None,
            "base": runs and Data.of(runs.name, "base", runs).state(),
            "prompts": list(self.prompts) or None,
            "steps": self.steps if runs else None,
            **more,
        }
        return {name: value for name, value in used.items() if value is not None}


def merged(adapters: Mapping[str, LoraBundle], settings: Settings) -> LoraBundle:
    """Make one adapter of several; ranks add up where the method is exact.

    The parts for text encoders are merged, too, where the method is exact; the others leave them
    out.

    Args:
        adapters: Name -> adapter.
        settings: The method and its options, with the roles of all adapters where it has gates.

    Raises:
        GatesError: The adapters do not fit each other or the method.
    """
    from diffusion.rivals.merged import merge

    settings.check()
    strengths = settings.strengths(adapters)
    if settings.gates:
        from apps.diffusion.generate import baked
        from diffusion.fusion.baking import strengthened

        if settings.base and settings.method == "baked":
            return baked(
                adapters,
                settings.base,
                settings.gates,
                settings.prompts,
                steps=settings.steps,
                seed=settings.seed,
                strengths=strengths,
                roles=settings.roles,
            )
        return strengthened(adapters, settings.gates, strengths=strengths, roles=settings.roles)
    if settings.method not in EXACT:
        return merge(
            adapters,
            strengths,
            settings.method,
            rank=settings.rank,
            seed=settings.seed,
            **({} if settings.density is None else {"density": settings.density}),
        )
    whole = merge(adapters, strengths, "cat")
    encoders = {}
    for component in dict.fromkeys(
        name for adapter in adapters.values() for name in adapter.text_encoders
    ):
        changing = {
            name: LoraBundle(bundle.family, bundle.text_encoders[component])
            for name, bundle in adapters.items()
            if component in bundle.text_encoders
        }
        encoders[component] = merge(
            changing, {name: strengths[name] for name in changing}, "cat"
        ).modules
    return LoraBundle(whole.family, whole.modules, encoders)


def merge(
    files: list[str],
    output: str,
    method: Name = "sum",
    weights: str | None = None,
    density: float | None = None,
    rank: int | None = None,
    energy: float | None = None,
    seed: int = 0,
    to: Format | None = None,
    dtype: Numbers | None = None,
    base: str | None = None,
    gates: str | None = None,
    prompts: str | None = None,
    steps: int = 20,
    roles: str | None = None,
    blocks: str | None = None,
    lenient: bool = False,
    overwrite_output: bool = False,
) -> None:
    """Make one adapter of FILES, which any program loads like one of them.

    FILES are .safetensors files, or folders of PEFT, of one family of models, known or not; the
    stem of a file is the name of its adapter, NAME=PATH gives it another.

    Args:
        files: Adapters that are merged, each as PATH or NAME=PATH.
        output: File of the merged adapter, a folder for peft.
        method: Way to merge. sum, mean, weighted and cat add changes exactly, and ranks add up;
            svd is their best approximation; the others are those of PEFT, on A and B, or on whole
            changes where the name ends with svd; baked folds the mean of trained gates into one
            adapter, and strengths those that `train-gates --what strengths` has trained.
        weights: Strengths by name, such as a:0.8,b:0.5, or one number per file in their order.
        density: Fraction of the entries that sparse methods keep; 0.5 by default.
        rank: Components per layer that are kept at most; the largest of the files for svd.
        energy: Fraction of the squared norm of each change that is kept at least, in (0, 1].
        seed: Seed of the entries that DARE drops, and of the images of baked.
        to: Format of the output, for FLUX.1 and SD3; by default that of the first file.
        dtype: Numbers of the output; by default those of the files, where they are exact.
        base: What the files are for: flux, sd3 or a folder of diffusers, whose layers they must
            fit; by default each file decides.
        gates: File of trained gates, for baked, which runs them in the base, or of strengths.
        prompts: Prompts on which baked observes the gates, divided by semicolons.
        steps: Denoising steps of each prompt of baked.
        roles: What adapters are for, such as a:subject,b:style; by default their tags decide.
        blocks: Factors of parts of the model: in:1,mid:.5,out:.8, double, single or joint.
        lenient: Leave out what cannot be used, merged or written, and list it.
        overwrite_output: Replace the output if it exists.
    """
    places = named_files(files)
    given = None if weights is None else strengths_of(weights, list(places))
    folder = Path(base) if base is not None and Path(base).is_dir() else None
    settings = Settings(
        method, given, density, rank, seed, folder, None if gates is None else Path(gates),
        tuple(filter(None, map(str.strip, (prompts or "").split(";")))), steps, roles_in(roles),
    )  # fmt: skip
    first: Format | None = "peft" if next(iter(places.values())).is_dir() else None
    form = Form(Path(output), to or first, energy, dtype, lenient, blocks)
    _check(places, settings, form, overwrite=overwrite_output)
    _merge(plain_console(), places, base_of(base), settings, form)


class Form(NamedTuple):
    """How the merged adapter is written.

    Attributes:
        path: Where to.
        to: Its format; None for that of the first file.
        energy: Fraction of the squared norm of each change that is kept at least; all if None.
        dtype: Its numbers.
        lenient: Whether what cannot be merged or written is left out.
        blocks: Factors of parts of the model, as text.
    """

    path: Path
    to: Format | None
    energy: float | None
    dtype: Numbers | None
    lenient: bool
    blocks: str | None = None


def _check(places: Mapping[str, Path], settings: Settings, form: Form, *, overwrite: bool) -> None:
    """Refuse wrong options before a file is read."""
    if len(places) < 2:
        raise GatesError("one file is nothing to merge: name two or more")
    settings.check()
    require_place(form.path, form.to, overwrite=overwrite)
    require_apart(form.path, places.values())


def _merge(
    console: Console,
    places: Mapping[str, Path],
    base: Base | None,
    settings: Settings,
    form: Form,
) -> None:
    """Merge adapters, print their norms and what is lost, and write the result.

    Raises:
        GatesError: There are parts for text encoders that the method leaves out, and ``lenient``
            is not asked for.
    """
    adapters = {
        name: load_lora(place, base, strict=not form.lenient, any_family=True)
        for name, place in places.items()
    }
    method, rank = settings.method, settings.rank
    to = _written_as(adapters, form.to)
    for what in (
        []
        if method in EXACT
        else [
            f"{len(layers)} layers of {component} in {name!r}"
            for name, bundle in adapters.items()
            for component, layers in bundle.text_encoders.items()
        ]
    ):
        if not form.lenient:
            raise GatesError(
                f"{method} cannot merge {what}: choose sum, mean, cat or svd, or add --lenient to"
                " leave them out"
            )
        console.print(escape(f"left out: {what}: {method} cannot merge them"))
    for name, bundle in adapters.items() if form.lenient else ():
        show_unused(console, bundle, f"{name}: ")
    settings = _with_roles(console, adapters, settings)
    whole = _with_blocks(merged(adapters, settings), form.blocks)
    to = with_names(console, whole, to)
    whole = storable(console, whole, to, lenient=form.lenient)
    if method == "svd" and rank is None and form.energy is None:
        rank = max(r for bundle in adapters.values() for r in bundle.ranks().values())
    small = shrunk(console, whole, to, rank, form.energy)
    strengths = settings.strengths(adapters)
    console.print(_norms(adapters, strengths, small))
    storages = {bundle.storage for bundle in adapters.values()}
    storage = storages.pop() if len(storages) == 1 else whole.storage
    more = {"rank": rank, "energy": form.energy, "blocks": form.blocks}
    record = settings.record(strengths=strengths, **more)
    result = dataclasses.replace(
        small, metadata=_metadata(adapters, record, form.path), storage=storage
    )
    write(console, result, form.path, to, form.dtype)


def _with_roles(
    console: Console, adapters: Mapping[str, LoraBundle], settings: Settings
) -> Settings:
    """Return settings with the roles of all adapters where gates are used."""
    if settings.gates is None:
        return settings
    from diffusion.fusion.baking import depends_on_roles
    from diffusion.fusion.gates_file import SWITCH, load_trained

    if any(SWITCH in name for name in load_trained(settings.gates)):
        console.print(
            escape(f"left out: the switch of {settings.gates}: a file cannot see prompts"),
            soft_wrap=True,
        )
    ask = depends_on_roles(settings.gates)
    return settings._replace(roles=roles_of(adapters, settings.roles, ask=ask))


def _with_blocks(bundle: LoraBundle, text: str | None) -> LoraBundle:
    """Return an adapter with the factors of ``--blocks``.

    Raises:
        GatesError: The blocks of the family are not known, or one is none of them or lacks its
            factor.
    """
    if text is None:
        return bundle
    if bundle.family not in PARTS:
        raise GatesError(f"the blocks of {bundle.family} are not known: leave --blocks out")
    if not all(":" in part for part in text.split(",")):
        raise GatesError(
            f"--blocks is {text!r}, expected blocks with factors, such as"
            f" {':0.5,'.join(PARTS[bundle.family])}:0.5"
        )
    return weighed(bundle, strengths_of(text, [*PARTS[bundle.family]], "--blocks"))


def _written_as(adapters: Mapping[str, LoraBundle], to: Format | None) -> str | Style:
    """Return the format of the result, by default the dialect of the first adapter.

    Raises:
        GatesError: They are of several families, or cannot be written so.
    """
    family, first = one_family(adapters), next(iter(adapters.values()))
    refuse_unlike(adapters)
    if to is None or family in FAMILIES or to == "peft":
        return to or style_of(first)
    if (own := own_style(first, to)) is None:
        raise GatesError(
            f"--to is for {' and '.join(FAMILIES)}, found {family} with other names than those of"
            f" {to}: leave it out"
        )
    return own


def _norms(
    adapters: Mapping[str, LoraBundle], strengths: Mapping[str, float], result: LoraBundle
) -> Table:
    """Return ‖ΔW‖ of each adapter, with its strength, and of the result, by block."""
    columns = {name: sums_of_squares(bundle.norms()) for name, bundle in adapters.items()}
    last = sums_of_squares(result.norms())
    heads = [f"{name} × {strengths[name]:.4g}" for name in columns]
    table = Table("‖ΔW‖", *map(escape, heads), "merged")
    for block, norm in last.items():
        cells = [f"{abs(strengths[n]) * shares.get(block, 0):.4g}" for n, shares in columns.items()]
        table.add_row(block, *cells, f"{norm:.4g}")
    return table


def _metadata(
    adapters: Mapping[str, LoraBundle], record: Mapping[str, Any], output: Path
) -> dict[str, str]:
    """Return the header of the first file, with where the result comes from, and all licenses."""
    described = {name: describe(bundle.metadata) for name, bundle in adapters.items()}
    titles = {name: text.title or name for name, text in described.items()}
    triggers = dict.fromkeys(word for text in described.values() for word in text.triggers)
    licenses = dict.fromkeys(text.license for text in described.values() if text.license)
    entries = {
        "modelspec.title": " + ".join(titles.values()),
        "modelspec.merged_from": ", ".join(titles.values()),
        "modelspec.trigger_phrase": ", ".join(triggers),
        "modelspec.license": "; ".join(licenses),
        "gates.merge": json.dumps(record),
    }
    first = kept_metadata(named_after(output, next(iter(adapters.values()))).metadata)
    return first | {key: text for key, text in entries.items() if text}
