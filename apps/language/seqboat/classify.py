"""``gates language classify``: what is said in recordings, and which tokens attend."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

import language
from apps.language.seqboat.activation_figure import activation_figure, activity, densities_of
from apps.language.seqboat.pieces import DATA, open_trained
from core_gates.errors import GatesError
from harness.command.verbs import Place
from harness.files import refuse_strangers, replacing, require_free, write_bytes, write_text
from harness.files.piece import Record, read_record
from language.seqboat.sequence_model import SeqBoat
from language.seqboat.speech import (
    INDEX,
    PACKED_RATE,
    audio_folder,
    read_speech,
    read_wave,
    waveform,
)

TRAINED = ("weights/configured-s*", "weights/seqboat-s*")  # by `fit`, and by `evaluate`
SHIPPED = Path(language.__file__).parent / "weights"
MADE = ("png", "csv")
FRONT = "model.model.init_args.front.init_args."
SPEECH = "language.seqboat.speech.SpeechData"


def classify(
    place: Place,
    files: list[str],
    weights: str | None = None,
    output: str | None = None,
    overwrite_output: bool = False,
) -> None:
    """Print what is said in each recording, how sure that is, and how many of its tokens attend.

    Args:
        place: Filled in by the command line.
        files: WAV files of one channel and 16 bits, at the rate that the model was trained with. A
            name such as 3_lucas_2.wav, where there is no such file, is that of the recording in
            the packed Free Spoken Digit Dataset in data/audio of the folder that the variable
            GATES_SHARED names, or of ../shared.
        weights: Folder of trained weights, such as ``runs/language/fsdd/weights/seqboat-s0``; those
            of the run if null, else those that ship.
        output: Folder for a picture of each recording with the tokens that attend in each layer,
            and their numbers as CSV; none if null.
        overwrite_output: Replace the output if it exists.
    """
    model, record, classes = opened(trained(place, weights))
    rate, length = (record.settings[f"{DATA}{name}"] for name in ("rate", "length"))
    names = [Path(file).stem for file in files]
    if output is not None:
        if len({*names}) < len(names):
            raise GatesError("two files have one name, and so would their pictures: rename one")
        require_free(Path(output), overwrite=overwrite_output)
        refuse_strangers(Path(output), [f"{name}.{ending}" for name in names for ending in MADE])
    waves = [samples_of(Path(file), rate) for file in files]
    drawn: list[tuple[str, Any, Any]] = []
    for file, samples in zip(files, waves, strict=True):
        chances, active = activity(model, sound := waveform(samples, length))
        label, chance = classes[int(chances.argmax())], chances.max()
        cut = f"\tfirst {len(sound) / rate:g} s" if len(sound) < len(samples) else ""
        print(f"{file}\t{label}\t{chance:.3f}\tattend by layer: {densities_of(active)}{cut}")
        drawn.append((Path(file).stem, active, (sound, f"{Path(file).name}: {label}", chance)))
    if output is not None:
        with replacing(Path(output)) as temporary:
            temporary.mkdir()
            for name, active, (sound, title, chance) in drawn:
                hop = int(record.settings[f"{FRONT}hop"])
                content = io.BytesIO()
                drawing = activation_figure(sound, active, rate, hop, title, chance)
                drawing.savefig(content, format="png", dpi=150)
                write_bytes(temporary / f"{name}.png", content.getvalue())
                write_text(temporary / f"{name}.csv", table(active, hop / rate))
        print(output)


def samples_of(file: Path, rate: int) -> np.ndarray:
    """Return the samples (S,) of a file; or, without one, of the packed recording of its name."""
    if not file.exists() and rate == PACKED_RATE and (audio_folder() / INDEX).is_file():
        packed = {one.name: one.samples for one in read_speech(audio_folder(), rate)}
        return packed[str(file)] if str(file) in packed else read_wave(file, rate)
    return read_wave(file, rate)


def table(active: np.ndarray, step: float) -> str:
    """Return the tokens that attend as CSV: start in seconds, and 1 or 0 for each layer."""
    head = ",".join(["start_s", *(f"layer{n}" for n in range(1, len(active) + 1))])
    rows = [
        ",".join([f"{number * step:.4f}", *map(str, column.astype(int))])
        for number, column in enumerate(active.T)
    ]
    return "\n".join([head, *rows]) + "\n"


def trained(place: Place, weights: str | None) -> Path:
    """Return the folder of trained weights.

    Raises:
        GatesError: There are none.
    """
    if weights is not None:
        return Path(weights)
    run = place.run_folder.path
    homes = (run, SHIPPED / run.name)
    for path in (one for home in homes for name in TRAINED for one in sorted(home.glob(name))):
        return path
    raise GatesError(
        f"{run} has no trained model: run `gates language fit --config "
        f"{place.config}` first, or name a folder by --weights"
    )


def opened(folder: Path) -> tuple[SeqBoat, Record, Sequence[str]]:
    """Return a trained model, its record, and the names of its classes.

    Raises:
        GatesError: The folder has none, or one that hears nothing, or was changed.
    """
    record = read_record(folder)
    if record is None or record.settings.get("data.class_path") != SPEECH:
        raise GatesError(
            f"{folder} has no model of speech: give a folder that `fit` or `evaluate` has written, "
            "such as runs/language/fsdd/weights/seqboat-s0"
        )
    return open_trained(folder, record), record, record.facts["classes"]
