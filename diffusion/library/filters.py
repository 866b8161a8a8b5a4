"""Which adapters a search may return."""

from typing import Any, NamedTuple

from diffusion.lora_file.container import clean


class Filters(NamedTuple):
    """Conditions that all hold; those that are None do not count. Case does not matter.

    Attributes:
        family: Such as ``flux``.
        license: Such as ``CC0-1.0``.
        tag: One of the tags.
    """

    family: str | None = None
    license: str | None = None
    tag: str | None = None

    def sql(self) -> tuple[str, dict[str, Any]]:
        """Return a condition on the row ``a`` of an adapter, and its parameters."""
        parts, values = ["1"], {}
        for column in ("family", "license"):
            if (wanted := getattr(self, column)) is not None:
                parts.append(f"fold(a.{column}) = :{column}")
                values[column] = _folded(wanted)
        if self.tag is not None:
            parts.append("EXISTS (SELECT 1 FROM tag t WHERE t.adapter = a.id AND t.tag = :tag)")
            values["tag"] = _folded(self.tag)
        return " AND ".join(parts), values

    def __str__(self) -> str:
        """Return the conditions in a few words."""
        stated = self._asdict().items()
        given = [f"{name} {clean(value, 80)!r}" for name, value in stated if value is not None]
        return " and ".join(given)


def _folded(text: str) -> str:
    """Return a text for comparisons; characters that cannot be written become marks."""
    return text.encode("utf-8", "replace").decode().strip().casefold()
