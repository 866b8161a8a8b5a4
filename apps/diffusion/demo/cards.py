"""Pieces of HTML of the page of ``gates diffusion demo``; all text of files is escaped."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

from apps.diffusion.generation.studio import Studio

COLUMNS = ("adapter", "title", "score", "mean gate", "why", "license")


def header(studio: Studio) -> str:
    """Return the head of the page."""
    adapters = len(studio.finder.library.adapters())
    badges = [
        f"base: {studio.model}",
        f"{adapters} adapters",
        "gates" if studio.gates is not None else "no gates: the plain sum",
        "nothing leaves this machine",
    ]
    found = "".join(f'<span class="badge">{escape(one)}</span>' for one in badges)
    return (
        '<div class="top"><div><h1>Adapters by prompt</h1><p>Describe an image: adapters are found '
        "by their weights, and each is weighed by a gate in every layer.</p></div>"
        f'<div class="badges">{found}</div></div>'
    )


def hint() -> str:
    """Return the card before anything is made."""
    return '<div class="card quiet">Adapters that are found appear here.</div>'


def message_card(text: str) -> str:
    """Return a card with an error."""
    return f'<div class="card warned">{escape(text)}</div>'


def found_card(adapters: Sequence[dict[str, Any]], notes: Sequence[str]) -> str:
    """Return the adapters with their scores, and why each was found.

    Args:
        adapters: As in the record of an image.
        notes: Lines below them.
    """
    cells = [_cells(one) for one in adapters]
    columns = [name for name in COLUMNS if name != "title" or any(row[name] for row in cells)]
    heads = "".join(f"<th>{name}</th>" for name in columns)
    rows = "".join(
        f"<tr>{''.join(f'<td>{escape(row[name])}</td>' for name in columns)}</tr>" for row in cells
    )
    lines = "".join(f"<li>{escape(note)}</li>" for note in notes)
    return (
        f'<div class="card"><table><thead><tr>{heads}</tr></thead>'
        f'<tbody>{rows}</tbody></table><ul class="notes">{lines}</ul></div>'
    )


def _cells(one: dict[str, Any]) -> dict[str, str]:
    title = one["title"] if one["title"] != one["name"] else ""
    figures = _figure(one["score"]), _figure(one["mean_gate"])
    found = (one["name"], title, *figures, one["why"], one["license"])
    return dict(zip(COLUMNS, map(str, found), strict=True))


def _figure(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"
