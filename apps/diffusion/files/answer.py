"""The answer to "why does it do nothing", with the command that helps."""

from __future__ import annotations

import math
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from diffusion.lora_file.family import FAMILIES
from diffusion.lora_file.inspection import Contents
from diffusion.lora_file.loaders import Verdict
from diffusion.lora_file.writers import text_encoders

WORST = ("error", "nothing", "part", "whole")
SAID = {
    "error": "{} refuses it",
    "nothing": "{} changes no layer and reports no error",
    "part": "{} applies a part of it",
    "whole": "{} applies all of it",
}


class Answer(NamedTuple):
    """What becomes of a file where it is loaded.

    Attributes:
        effect: ``nothing``, ``part``, ``error`` or ``whole`` as in a verdict, ``zero``, ``broken``,
            ``text`` for text encoders alone, ``family`` for one that cannot be read.
        text: One sentence.
        fix: Command that helps; empty if none does.
    """

    effect: str
    text: str
    fix: str = ""


def answer(path: Path, contents: Contents) -> Answer:
    """Return what becomes of a file, and the command that helps."""
    layers = contents.layers
    if contents.family not in FAMILIES:
        return Answer(
            "family",
            f"it is an adapter for {contents.family}: programs pass it over or refuse it where the "
            "model is FLUX.1 or SD3; load it into a model of that family",
        )
    if not layers and contents.text_encoders:
        named = " and ".join(contents.text_encoders)
        return Answer("text", f"it changes {named} alone: the image model stays as it is")
    if not layers:
        return Answer("nothing", "none of its tensors has the name of a layer of FLUX.1 or SD3")
    if not all(math.isfinite(layer.norm) for layer in layers.values()):
        return Answer("broken", "it holds NaN or infinity: images turn black; get the file again")
    if contents.norm == 0:
        return Answer("zero", "the change of every layer is zero: there is nothing to apply")
    return _of_loaders(path, contents)


def _of_loaders(path: Path, contents: Contents) -> Answer:
    worst = min(contents.verdicts, key=lambda verdict: WORST.index(verdict.effect))
    text = SAID[worst.effect].format(worst.loader)
    lost = sorted(set(contents.text_encoders) - text_encoders("diffusers", contents.family))
    aside = f"; it reads no adapters of {' and '.join(lost)}" if lost else ""
    if worst.effect == "whole":
        hint = listed_triggers(contents.description.triggers)
        text = text.replace("all of it", "all layers of the transformer") if lost else text
        return Answer("whole", text + aside + (f"; its prompt needs {hint}" if hint else ""))
    causes = _causes(contents.verdicts) + aside
    return Answer(worst.effect, f"{text}: {causes}", fix_of(path, contents))


def _causes(verdicts: Sequence[Verdict]) -> str:
    """Return why, with the number of tensors where several causes share the file."""
    bad = [verdict for verdict in verdicts if verdict.effect != "whole"]
    if len(verdicts) == 1:
        return bad[0].what
    return ", ".join(f"{verdict.what} ({verdict.tensors} tensors)" for verdict in bad)


def listed_triggers(triggers: Sequence[str]) -> str:
    """Return triggers in quotes."""
    return ", ".join(f"'{trigger}'" for trigger in triggers)


def fix_of(path: Path, contents: Contents) -> str:
    """Return the command that writes the file so that diffusers applies all of it."""
    stem = path.name if path.is_dir() else path.stem
    output = path.with_name(f"{stem}.diffusers.safetensors")
    words = ["gates", "diffusion", "convert", str(path), str(output), "--to", "diffusers"]
    lost = set(contents.text_encoders) - text_encoders("diffusers", contents.family)
    return shlex.join([*words, *(["--lenient"] if lost or contents.left_out else [])])
