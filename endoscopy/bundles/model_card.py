"""The text that goes with weights."""

from collections.abc import Mapping
from typing import Any

from endoscopy.bundles.scope import NO_CALIBRATION
from endoscopy.models.sizer import channels_of

TEMPLATE = """---
license: apache-2.0
tags: [endoscopy, polyp-sizing, research-only]
---
# Polyp sizing: {trunk}, gates {gates}

**Intended use: research only.** Not a medical device; not for diagnosis, treatment or any decision
about a patient.

## Scope

- Trained on: {trained_on}.
- Millimeters are calibrated for: {calibrated_for}.
- On any other source sizes are given as a size index, relative to a lesion of
  {reference_mm:.3g} mm, with the note "{note}".

## Input and output

- Streams: {streams}; frames of {image_size} x {image_size} pixels, the aspect not kept; normalized
  by the mean and standard deviation of the training data of arXiv 2407.04400.
- Location of the lesion: {location}.
- Target: {target}.
- Abstention: {quality}.
- Intervals: {intervals}.
{facts}"""


LOCATIONS = {
    "mask": "mask, or the ellipse inscribed into its box",
    "box": "box",
    "either": "mask, or its box",
}
"""What a network needs of a lesion, by the outline that it was trained with."""


def model_card(config: Mapping[str, Any]) -> str:
    """Return a model card in Markdown.

    Args:
        config: Of :meth:`endoscopy.bundles.contents.SizingBundle.config`.
    """
    scope, model, fitted = config["scope"], config["model"], config["intervals"]
    masks = LOCATIONS[config["outline"]]
    intervals = "none"
    if fitted:
        counts = ", ".join(f"{name} {len(one['residuals'])}" for name, one in fitted.items())
        coverage = next(iter(fitted.values()))["coverage"]
        intervals = (
            f"split conformal, {coverage:.0%} nominal, of whole objects and of few frames, fitted"
            f" to each way of locating lesions (objects: {counts}); they hold for exchangeable"
            " objects located in the same way only"
        )
    return TEMPLATE.format(
        trunk=model["trunk"],
        gates=model["gates"],
        trained_on=scope["trained_on"],
        calibrated_for=", ".join(scope["calibrated_for"]) or "nothing",
        reference_mm=scope["reference_mm"],
        note=NO_CALIBRATION,
        streams=", ".join(channels_of(model["streams"])),
        image_size=config["image_size"],
        location=masks,
        target=config["target"]["name"],
        quality="none" if config["quality"] is None else "limits fitted to the training frames",
        intervals=intervals,
        facts=_facts(config["facts"]),
    )


def _facts(facts: Mapping[str, Any]) -> str:
    if not facts:
        return ""
    lines = [f"- {name}: {value}" for name, value in facts.items()]
    return "\n".join(["", "## Facts", "", *lines, ""])
