"""Pieces of HTML of the page of ``gates endoscopy demo``."""

from __future__ import annotations

import math
from html import escape

from apps.endoscopy.demo.clip import Clip, Measured
from apps.endoscopy.weights import NamedBundle
from endoscopy.bundles.contents import SizingBundle
from endoscopy.bundles.scope import NO_CALIBRATION, RESEARCH_ONLY

LEAST, MOST = 1.0, 32.0  # ends of the ruler, mm
TICKS = (1, 2, 5, 10, 20)
WIDTH, BASE = 440.0, 34.0  # of the ruler, pixels


def header(found: NamedBundle) -> str:
    """Return the head of the page."""
    scopes = ", ".join(found.bundle.scope.calibrated_for) or "nothing"
    return (
        '<div class="top"><div><h1>Polyp size</h1>'
        "<p>Drop a frame or a clip, accept the proposed box or draw your own, and measure.</p>"
        f'</div><div class="badges"><span class="badge warn">{RESEARCH_ONLY}</span>'
        '<span class="badge">nothing leaves this machine</span>'
        f'<span class="badge">weights: {escape(found.name)}</span>'
        f'<span class="badge">millimeters for: {escape(scopes)}</span></div></div>'
    )


def hint(clip: Clip | None) -> str:
    """Return instructions for the next step."""
    if clip is None:
        text = "Or try the example, a rendered polyp, whose true size is known."
    elif clip.corner is not None:
        text = "Now click the opposite corner."
    elif clip.drawn:
        count = len(clip.drawn)
        text = f"{count} drawn box{'es' if count > 1 else ''}: only drawn frames count. Measure."
    elif clip.found:
        text = (
            f"Automatic box on {len(clip.found)} of {len(clip.images)} frames (dashed): accept it "
            "with Measure, or click two opposite corners to draw your own."
        )
    else:
        text = "No polyp found: click two opposite corners around it."
    return f'<div class="hint">{text}</div>'


def empty_card() -> str:
    """Return the card before anything is measured."""
    return '<div class="card quiet"><div class="label">Size</div><div class="value">–</div></div>'


def message_card(text: str) -> str:
    """Return a card with an error."""
    return f'<div class="card warned"><div class="label">Not measured</div>{escape(text)}</div>'


def result_card(result: Measured, bundle: SizingBundle, truth: float | None) -> str:
    """Return the card of a size."""
    kind = " warned" if result.reasons else ""
    return (
        f'<div class="card{kind}"><div class="label">{_label(result)}</div>{_value(result)}'
        f"{_interval(result, bundle)}{_ruler(result, truth) if result.calibrated else ''}"
        f"{_notes(result, bundle, truth)}</div>"
    )


def _label(result: Measured) -> str:
    if result.reasons:
        return f"Abstains: {escape(result.reasons)}"
    return "Size" if result.calibrated else "Size index"


def _value(result: Measured) -> str:
    unit = '<span class="unit">mm</span>' if result.calibrated else ""
    digits = 1 if result.calibrated else 2
    return f'<div class="value">{result.size:.{digits}f}{unit}</div>'


def _interval(result: Measured, bundle: SizingBundle) -> str:
    conformal = bundle.intervals.get("automatic" if result.origin == "automatic" else "boxes")
    if conformal is None or not math.isfinite(result.low):
        return f'<div class="interval">no interval: {_why_none(result)}</div>'
    return (
        f'<div class="interval">{conformal.coverage:.0%} interval '
        f"{result.low:.3g} to {result.high:.3g} mm</div>"
    )


def _why_none(result: Measured) -> str:
    if not result.calibrated:
        return "out of the scope of these weights"
    if result.reasons:
        return "the polyp abstains"
    return f"these weights have none for {result.origin} boxes"


def _notes(result: Measured, bundle: SizingBundle, truth: float | None) -> str:
    counting, total = result.frames
    count = "frames count" if total > 1 else "frame counts"
    lines = [f"{counting} of {total} {count}; box {result.origin}"]
    if not result.calibrated:
        lines.append(
            f"{NO_CALIBRATION}: 1 stands for an average lesion of the training data "
            f"({bundle.scope.trained_on}), and no size in millimeters"
        )
    elif truth is not None:
        lines.append(f"true size of the rendered polyp: {truth:.1f} mm")
    lines.append(f"{RESEARCH_ONLY}, no medical device")
    items = "".join(f"<li>{escape(line)}</li>" for line in lines)
    return f'<ul class="notes">{items}</ul>'


def _ruler(result: Measured, truth: float | None) -> str:
    """Draw size and interval on a logarithmic ruler with the clinical classes."""
    parts = [f'<svg class="ruler" viewBox="0 0 {WIDTH:.0f} 66" role="img" '
             f'aria-label="{result.size:.1f} millimeters on a ruler">']  # fmt: skip
    classes = (("diminutive", LEAST, 5.0), ("small", 5.0, 10.0), ("large", 10.0, MOST))
    for number, (name, low, high) in enumerate(classes):
        x, width = _x(low), _x(high) - _x(low)
        parts.append(f'<rect class="class{number}" x="{x:.1f}" y="{BASE - 12}" '
                     f'width="{width:.1f}" height="12"/>')  # fmt: skip
        parts.append(f'<text class="name" x="{x + width / 2:.1f}" y="{BASE - 18}">{name}</text>')
    parts += [
        f'<text class="tick" x="{_x(tick):.1f}" y="{BASE + 26}">{tick}</text>' for tick in TICKS
    ]
    if math.isfinite(result.low):
        low, high = _x(result.low), _x(result.high)
        parts.append(f'<rect class="band" x="{low:.1f}" y="{BASE + 3}" '
                     f'width="{high - low:.1f}" height="8" rx="4"/>')  # fmt: skip
    parts.append(f'<circle class="dot" cx="{_x(result.size):.1f}" cy="{BASE + 7}" r="7"/>')
    if truth is not None:
        x = _x(truth)
        parts.append(f'<path class="truth" d="M{x:.1f} {BASE - 14}V{BASE + 14}"/>')
    return "".join([*parts, "</svg>"])


def _x(mm: float) -> float:
    share = math.log(min(max(mm, LEAST), MOST) / LEAST) / math.log(MOST / LEAST)
    return 10 + share * (WIDTH - 20)
