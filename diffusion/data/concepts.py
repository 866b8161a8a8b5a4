"""Concepts that adapters are trained on, and pairs of them; some no gate is ever trained on."""

from typing import Literal, NamedTuple

from diffusion.data.scenes import Part, Scene, scenes
from diffusion.data.shapes import BASE_SHAPES, NEW_SHAPES
from diffusion.data.styles import BASE_STYLES, NEW_FILLS, NEW_STYLES, WHOLE

Kind = Literal["subject", "style"]


class Concept(NamedTuple):
    """What an adapter adds to the base.

    Attributes:
        name: Of the shape or the style.
        kind: Of the concept.
    """

    name: str
    kind: Kind

    def scenes(self, part: Part) -> list[Scene]:
        """Return the scenes of a part, in the styles or of the shapes of the base."""
        if self.kind == "subject":
            return scenes(part, shapes=[self.name])
        return scenes(part, styles=[(self.name,)])


def concepts() -> list[Concept]:
    """Return all 40 concepts: subjects, then styles."""
    return [*map(subject, NEW_SHAPES), *map(style, NEW_STYLES)]


def subject(name: str) -> Concept:
    """Return the concept of a shape."""
    return Concept(name, "subject")


def style(name: str) -> Concept:
    """Return the concept of a style."""
    return Concept(name, "style")


PER_SUBJECT = 3  # test pairs of each subject; each style is then in two of them


class Combination(NamedTuple):
    """Adapters that should work together.

    Attributes:
        subject: Its shape.
        styles: One style, or two that are applied in order.
        useless: Adapters that scenes show nothing of.
    """

    subject: str
    styles: tuple[str, ...]
    useless: tuple[str, ...] = ()

    @property
    def adapters(self) -> tuple[str, ...]:
        """Names of the adapters, the subject first; what the base draws needs none."""
        named = (self.subject, *self.styles, *self.useless)
        return tuple(name for name in named if name not in (*BASE_SHAPES, *BASE_STYLES))

    @property
    def name(self) -> str:
        """Name in tables."""
        return " + ".join((self.subject, *self.styles, *self.useless))

    def scenes(self, part: Part) -> list[Scene]:
        """Return the scenes of a part."""
        return scenes(part, [self.subject], [self.styles])


def held_out_pairs() -> list[Combination]:
    """Return 48 pairs for tests: each subject in three of them, each style in two."""
    names = list(NEW_STYLES)
    return [
        Combination(subject, (names[(place * PER_SUBJECT + number) % len(names)],))
        for place, subject in enumerate(NEW_SHAPES)
        for number in range(PER_SUBJECT)
    ]


def training_pairs() -> list[Combination]:
    """Return the other 336 pairs."""
    tested = set(held_out_pairs())
    every = [Combination(subject, (style,)) for subject in NEW_SHAPES for style in NEW_STYLES]
    return [pair for pair in every if pair not in tested]


def with_second_style(pairs: list[Combination], shift: int = 0) -> list[Combination]:
    """Return each pair with one more style, so that one is of the shape and one of the whole image.

    Args:
        pairs: Subjects with one style.
        shift: Place in the lists of further styles where they begin.
    """
    pairs_of_two = []
    for place, pair in enumerate(pairs):
        style = pair.styles[0]
        others = list(NEW_FILLS if style in WHOLE else WHOLE)
        other = others[(place + shift) % len(others)]
        pairs_of_two.append(
            Combination(pair.subject, (other, style) if style in WHOLE else (style, other))
        )
    return pairs_of_two


def with_useless(pairs: list[Combination]) -> list[Combination]:
    """Return each pair with an adapter that has nothing to do with it, one after the other."""
    extended, names = [], [concept.name for concept in concepts()]
    for place, pair in enumerate(pairs):
        others = [name for name in names if name not in pair.adapters]
        extended.append(pair._replace(useless=(others[7 * place % len(others)],)))
    return extended


def of_one_adapter() -> list[Combination]:
    """Return the combinations that need one adapter: a shape, or a style on a shape of the base."""
    plain, shapes = next(iter(BASE_STYLES)), list(BASE_SHAPES)
    styled = [Combination(shapes[n % len(shapes)], (s,)) for n, s in enumerate(NEW_STYLES)]
    return [*(Combination(shape, (plain,)) for shape in NEW_SHAPES), *styled]


def of_no_adapter() -> list[Combination]:
    """Return the combinations that need none: the shapes of the base in its styles."""
    return [Combination(shape, (style,)) for shape in BASE_SHAPES for style in BASE_STYLES]


LEFT_OUT = (*list(NEW_SHAPES)[1::4], *list(NEW_STYLES)[1::4])
"""Concepts that some gates see no adapter of: 4 shapes and 6 styles."""
