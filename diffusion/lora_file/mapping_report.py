"""What became of every tensor of a file, and which loaders read such a file."""

from collections import Counter
from typing import Literal, NamedTuple

from diffusion.lora_file.container import LoraFileError, clean


class Dialect(NamedTuple):
    """How a tensor is named.

    Attributes:
        prefix: Such as ``lora_unet_``.
        names: Table of the names of layers, such as ``bfl``.
        factors: Spelling of the factor, such as ``lora_down.weight``.
        underscored: Whether underscores replace the dots of the layer.
        kind: Of factors, such as ``loha``; empty where the tensor belongs to none.
    """

    prefix: str
    names: str
    factors: str
    underscored: bool = False
    kind: str = ""

    def __str__(self) -> str:
        """Return the three parts in a few words."""
        names = f"{self.names} names" + (" with underscores" if self.underscored else "")
        return f"{self.prefix or 'no prefix'}, {names}, {self.factors}"


class Fate(NamedTuple):
    """What became of a tensor.

    Attributes:
        key: Its name in the file.
        component: ``transformer`` or a text encoder such as ``text_encoder_2``; empty if unknown.
        modules: diffusers names of the layers that it changes.
        dialect: How it is named; None if the name is unknown.
        reason: Why it is left out; empty if it is used.
    """

    key: str
    component: str = ""
    modules: tuple[str, ...] = ()
    dialect: Dialect | None = None
    reason: str = ""


class MappingReport(NamedTuple):
    """What became of every tensor of a file, and what is noteworthy about it.

    Attributes:
        fates: One entry per tensor, in the order of the names.
        family: Of models, such as ``flux``.
        evidence: What the family was concluded from.
        problems: Reasons for which the strict reader refuses the file, tensors left out excepted.
        notes: Assumptions.
        zero: Layers whose change is zero.
    """

    fates: tuple[Fate, ...]
    family: str
    evidence: str
    problems: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    zero: tuple[str, ...] = ()

    @property
    def used(self) -> tuple[Fate, ...]:
        """The tensors that are used."""
        return tuple(fate for fate in self.fates if not fate.reason)

    @property
    def unused(self) -> tuple[Fate, ...]:
        """The tensors that are left out."""
        return tuple(fate for fate in self.fates if fate.reason)

    @property
    def dialects(self) -> tuple[Dialect, ...]:
        """The dialects of the transformer's tensors, the most frequent first."""
        count = Counter(
            fate.dialect for fate in self.fates if fate.dialect and fate.component == "transformer"
        )
        return tuple(dialect for dialect, _ in count.most_common())

    def summary(self) -> str:
        """Return the reasons for a refusal in one line; empty if there are none."""
        parts = list(self.problems)
        if unused := self.unused:
            first = unused[0]
            more = f", and {len(unused) - 1} more" if len(unused) > 1 else ""
            parts.insert(
                0,
                f"{len(unused)} of {len(self.fates)} tensors cannot be used: "
                f"{clean(first.key, 160)}: {first.reason}{more}",
            )
        return "; ".join(parts[:3])


class MappingError(LoraFileError):
    """Tensors of a file belong to no layer, or do not fit the one they belong to.

    Args:
        message: One line.
        report: What became of every tensor.
    """

    def __init__(self, message: str, report: MappingReport) -> None:
        super().__init__(message)
        self.report = report


DIFFUSERS = "diffusers 0.42.1"
Effect = Literal["whole", "part", "nothing", "error"]


class Rule(NamedTuple):
    """What a loader does with a dialect; empty conditions hold for all.

    Attributes:
        effect: ``whole``: all layers are changed as they should be; ``part``: some are left out or
            scaled differently; ``nothing``: it runs and the image is as without the file;
            ``error``: it raises.
        what: In a few words.
        families: Of models.
        prefixes: Of names.
        names: Tables of names of layers.
        kinds: Of factors.
        factors: Spellings that all occur.
        modules: diffusers names of layers, one of which occurs.
        ends: Ends of names of layers, one of which occurs.
    """

    effect: Effect
    what: str = ""
    families: tuple[str, ...] = ()
    prefixes: tuple[str, ...] = ()
    names: tuple[str, ...] = ()
    kinds: tuple[str, ...] = ()
    factors: tuple[str, ...] = ()
    modules: tuple[str, ...] = ()
    ends: tuple[str, ...] = ()

    def holds(self, group: "Group") -> bool:
        """Return whether the rule is about a group of tensors."""
        return (
            (not self.families or group.family in self.families)
            and (not self.prefixes or group.prefix in self.prefixes)
            and (not self.names or group.names in self.names)
            and (not self.kinds or bool(group.kinds.intersection(self.kinds)))
            and group.factors.issuperset(self.factors)
            and (not self.modules or bool(group.modules.intersection(self.modules)))
            and (not self.ends or any(name.endswith(self.ends) for name in group.modules))
        )


class Group(NamedTuple):
    """The tensors of the transformer that share a prefix.

    Attributes:
        family: Of the model.
        prefix: Of their names.
        names: Table of the names of most of their layers.
        kinds: Of their factors.
        factors: Spellings of their factors.
        modules: diffusers names of their layers.
        tensors: Number of them.
    """

    family: str
    prefix: str
    names: str
    kinds: frozenset[str]
    factors: frozenset[str]
    modules: frozenset[str]
    tensors: int


class Verdict(NamedTuple):
    """What a loader does with a part of a file.

    Attributes:
        loader: Program and version in which it was measured.
        effect: See `Rule`.
        what: In a few words.
        tensors: Number of tensors it is about.
    """

    loader: str
    effect: Effect
    what: str
    tensors: int


_FLUX, _SD3 = ("flux",), ("sd3",)
_PROCESSORS, _DIFFUSERS = ("attention processors",), ("diffusers",)
_OWN, _KOHYA = ("transformer.",), ("lora_unet_", "lora_transformer_")
_DOWN = ("lora_down.weight",)
_LYCORIS = ("loha", "lokr")
_OUTER = (
    "x_embedder",
    "context_embedder",
    "time_text_embed.timestep_embedder.linear_1",
    "time_text_embed.timestep_embedder.linear_2",
    "time_text_embed.guidance_embedder.linear_1",
    "time_text_embed.guidance_embedder.linear_2",
    "time_text_embed.text_embedder.linear_1",
    "time_text_embed.text_embedder.linear_2",
    "proj_out",
    "norm_out.linear",
)
_TEXT = (".add_q_proj", ".add_k_proj", ".add_v_proj", ".to_add_out")
_BFL = {"prefixes": ("lora_unet_", "diffusion_model."), "names": ("bfl",), "families": _FLUX}
_MAGNITUDES = "magnitudes of DoRA are dropped"
_UNNAMED = "names of factors without 'lora' are refused: ValueError"
_UNREAD = "the names are passed over silently"

RULES = (
    Rule(
        "error",
        "α is not expected: KeyError",
        (),
        ("", "diffusion_model."),
        ("xlabs",),
        (),
        ("alpha",),
    ),
    Rule("whole", "", (), ("", "diffusion_model."), ("xlabs",)),
    Rule("error", "the prefix is not known: ValueError", (), (), ("xlabs",)),
    Rule("part", "α is ignored", (), _OWN, _PROCESSORS, (), ("alpha",)),
    Rule("part", "layers of the text stream are dropped", (), _OWN, _PROCESSORS, ends=_TEXT),
    Rule("whole", "", (), _OWN, _PROCESSORS),
    Rule("nothing", _UNREAD, (), (), _PROCESSORS),
    Rule("nothing", "names of kohya are passed over silently for SD3", _SD3, _KOHYA),
    Rule("error", _UNNAMED, _SD3, factors=("alpha",)),
    Rule("error", _UNNAMED, _SD3, kinds=_LYCORIS),
    Rule(
        "error",
        "magnitudes of LyCORIS are refused: IndexError",
        _SD3,
        _OWN,
        factors=("dora_scale",),
    ),
    Rule("whole", "", _SD3, _OWN, _DIFFUSERS, (), ("lora_A.weight",)),
    Rule("whole", "", _SD3, _OWN, _DIFFUSERS, (), ("lora.down.weight",)),
    Rule("error", "the factors are not known: IndexError", _SD3, _OWN, _DIFFUSERS, (), _DOWN),
    Rule(
        "error",
        "the factors are not known: IndexError",
        _SD3,
        _OWN,
        _DIFFUSERS,
        (),
        ("lora_linear_layer.down.weight",),
    ),
    Rule(
        "nothing",
        "factors without .weight, or with the name of an adapter, are passed over silently",
        _SD3,
        _OWN,
        _DIFFUSERS,
    ),
    Rule("error", "the layers are not found", _SD3, _OWN),
    Rule("nothing", _UNREAD, _SD3),
    Rule(
        "error",
        "names of PEFT are taken for those of a Kontext file: KeyError",
        _FLUX,
        ("base_model.model.", "base_model.model.transformer.", "base_model.model.diffusion_model."),
    ),
    Rule(
        "error",
        "the core of a Tucker decomposition is refused: ValueError",
        factors=("lora_mid.weight",),
    ),
    Rule("part", _MAGNITUDES, factors=(*_DOWN, "dora_scale"), **_BFL),
    Rule("part", "layers outside of the blocks are dropped", factors=_DOWN, modules=_OUTER, **_BFL),
    Rule("whole", "", factors=_DOWN, **_BFL),
    Rule("error", _UNNAMED, _FLUX, _OWN, _DIFFUSERS, _LYCORIS),
    Rule("part", _MAGNITUDES, _FLUX, _OWN, _DIFFUSERS, (), ("dora_scale",)),
    Rule("part", "α is ignored", _FLUX, _OWN, _DIFFUSERS, (), (*_DOWN, "alpha")),
    Rule(
        "error",
        "the factors are not known: IndexError",
        _FLUX,
        _OWN,
        _DIFFUSERS,
        (),
        ("lora_linear_layer.down.weight",),
    ),
    Rule(
        "part",
        "α of the last layer is used for others, too",
        _FLUX,
        _OWN,
        _DIFFUSERS,
        (),
        ("lora_A.weight", "alpha"),
        ("proj_out",),
    ),
    Rule(
        "part",
        "α of the last layer is used for others, too",
        _FLUX,
        _OWN,
        _DIFFUSERS,
        (),
        ("lora.down.weight", "alpha"),
        ("proj_out",),
    ),
    Rule("whole", "", _FLUX, _OWN, _DIFFUSERS, (), ("lora_A.weight",)),
    Rule("whole", "", _FLUX, _OWN, _DIFFUSERS, (), ("lora.down.weight",)),
    Rule("whole", "", _FLUX, _OWN, _DIFFUSERS, (), _DOWN),
    Rule(
        "nothing",
        "factors without .weight, or with the name of an adapter, are passed over silently",
        _FLUX,
        _OWN,
        _DIFFUSERS,
    ),
    Rule("error", "the layers are not found", _FLUX, _OWN),
    Rule("error", "the layers are not known", _FLUX, _KOHYA, factors=_DOWN),
    Rule("nothing", _UNREAD, _FLUX, _KOHYA),
    Rule("error", "names of kohya's factors are refused here: ValueError", _FLUX, factors=_DOWN),
    Rule("error", _UNNAMED, _FLUX, kinds=_LYCORIS),
    Rule("nothing", _UNREAD, _FLUX),
)
"""The first rule that holds decides. Each dialect that this package reads was loaded into a
pipeline of diffusers 0.42.1, and the change of each weight compared with what it should be."""


def verdicts(report: MappingReport) -> list[Verdict]:
    """Return how diffusers treats each part of a file (loads, ignores, fails), largest first."""
    parts = []
    for group in _groups(report):
        rule = next(rule for rule in RULES if rule.holds(group))
        parts.append(Verdict(DIFFUSERS, rule.effect, rule.what, group.tensors))
    return sorted(parts, key=lambda verdict: -verdict.tensors)


def _groups(report: MappingReport) -> list[Group]:
    """Gather the tensors with the same prefix; the names of most of them count for all."""
    members: dict[str, list[tuple[Fate, Dialect]]] = {}
    for fate in report.fates:
        if fate.dialect is not None and fate.component == "transformer":
            members.setdefault(fate.dialect.prefix, []).append((fate, fate.dialect))
    return [
        Group(
            report.family,
            prefix,
            Counter(dialect.names for _, dialect in fates).most_common(1)[0][0],
            frozenset(dialect.kind for _, dialect in fates),
            frozenset(dialect.factors for _, dialect in fates),
            frozenset(name for fate, _ in fates for name in fate.modules),
            len(fates),
        )
        for prefix, fates in members.items()
    ]
