"""What became of every tensor of a file."""

from collections import Counter
from typing import NamedTuple

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
