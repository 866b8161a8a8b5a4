"""Spoken digits and words: files of samples, splits by recording or by speaker."""

from __future__ import annotations

import hashlib
import json
import lzma
import os
import re
import wave
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from core_gates.errors import GatesError, check_at_least
from language.seqboat.sequences import SPLITS, Part, SequenceData, Split

INDEX, PACKED = "fsdd_index.json", "fsdd_pcm16_8k.delta.xz"
PCM_SHA256 = "6f643a7422de89763625dfc9aa79427e69f7a690223a5bc5752a2f56db5af465"
TESTED, CHOSEN = range(5), range(45, 50)  # indices of recordings that test and that choose weights
NAME = re.compile(r"([0-9])_([^\W\d_].*)_([0-9]+)\.(?i:wav)")
WAVES = "*.[wW][aA][vV]"
PACKED_RATE = 8000
SC10 = ("yes", "no", "up", "down", "left", "right", "on", "off", "stop", "go")
FULL_SCALE = 2**15


def audio_folder() -> Path:
    """Return ``data/audio`` of the folder that GATES_SHARED names, or of ``../shared``."""
    return Path(os.environ.get("GATES_SHARED", "../shared"), "data", "audio")


class Recording(NamedTuple):
    """A recording.

    Attributes:
        name: Of its file.
        label: What is said.
        speaker: Who says it; empty if that is not known.
        number: Which of the recordings of this speaker and label it is.
        samples: (S,) int16.
    """

    name: str
    label: str
    speaker: str
    number: int
    samples: NDArray[np.int16]


def read_wave(path: Path, rate: int) -> NDArray[np.int16]:
    """Return the samples (S,) of a WAV file of one channel and 16 bits.

    Args:
        path: The file.
        rate: Samples per second that it must have.

    Raises:
        GatesError: It is another file, has another rate, no sample, or ends before its header says.
    """
    convert = f"convert it, as ffmpeg -i {path.name} -ac 1 -ar {rate} -sample_fmt s16 NEW.wav does"
    try:
        with wave.open(str(path), "rb") as file:
            channels, width, found_rate, length = file.getparams()[:4]
            pcm = file.readframes(length)
    except (wave.Error, EOFError) as error:
        raise GatesError(
            f"{path} is no WAV file of plain samples ({str(error) or 'it ends in its header'}): "
            f"{convert}"
        ) from error
    except OSError as error:
        raise GatesError(
            f"{path} cannot be read: {error.strerror or error}; check the path"
        ) from error
    for what, value, expected in (
        ("channels", channels, 1),
        ("bits per sample", 8 * width, 16),
        ("samples per second", found_rate, rate),
    ):
        if value != expected:
            raise GatesError(f"{path} has {value} {what}, expected {expected}: {convert}")
    if length == 0:
        raise GatesError(f"{path} has no samples: leave the file out")
    if len(pcm) < length * width:
        raise GatesError(
            f"{path} has {len(pcm) // width} samples, but its header says {length}: the file was "
            f"cut off, copy it again; or it was written through a pipe, {convert}"
        )
    return np.frombuffer(pcm, "<i2").astype(np.int16)


def read_packed(folder: Path) -> list[Recording]:
    """Return the recordings of the Free Spoken Digit Dataset from its two packed files.

    Raises:
        GatesError: A file is missing or damaged, or holds other samples.
    """
    try:
        index = json.loads((folder / INDEX).read_bytes())
        packed = lzma.decompress((folder / PACKED).read_bytes())
        names, lengths = list(map(str, index["names"])), np.array(index["lengths"], dtype=np.int64)
        halves = np.frombuffer(packed, np.uint8).reshape(2, lengths.sum())
    except OSError as error:
        raise GatesError(f"{error.filename} cannot be read: {error.strerror}") from error
    except (lzma.LZMAError, ValueError, KeyError, TypeError, EOFError) as error:
        raise GatesError(
            f"{folder}: {PACKED} or {INDEX} is damaged ({error}): copy both files again"
        ) from error
    steps = np.ascontiguousarray(halves.T).view("<i2").ravel()
    parts = np.split(steps, lengths.cumsum()[:-1])
    sounds = [part.cumsum(dtype=np.int64).astype(np.int16) for part in parts]  # modulo 2^16
    digest = hashlib.sha256(b"".join(sound.astype("<i2").tobytes() for sound in sounds))
    if digest.hexdigest() != PCM_SHA256:
        raise GatesError(
            f"{folder / PACKED} has samples with SHA-256 {digest.hexdigest()[:16]}..., expected "
            f"{PCM_SHA256[:16]}...: copy both files again"
        )
    return [recording(name, sound) for name, sound in zip(names, sounds, strict=True)]


def recording(name: str, samples: NDArray[np.int16]) -> Recording:
    """Return a recording with the digit, speaker and index that its name states.

    Raises:
        GatesError: It states none.
    """
    if (match := NAME.fullmatch(name)) is None:
        raise GatesError(
            f"{name}: expected DIGIT_SPEAKER_INDEX.wav, such as 7_jackson_32.wav: rename the file"
        )
    digit, speaker, index = match.groups()
    return Recording(name, digit, speaker, int(index), samples)


def read_speech(folder: Path, rate: int) -> tuple[Recording, ...]:
    """Return the recordings of a folder, by name.

    Args:
        folder: The packed Free Spoken Digit Dataset; or files ``DIGIT_SPEAKER_INDEX.wav``; or a
            folder of WAV files for each word, as Speech Commands has them.
        rate: Samples per second of WAV files.

    Raises:
        GatesError: It has no recordings, words next to digits, or a recording that cannot be read.
    """
    return _recordings(folder.resolve(), rate)


@cache
def _recordings(folder: Path, rate: int) -> tuple[Recording, ...]:
    if (folder / INDEX).is_file():
        if rate != PACKED_RATE:
            raise GatesError(f"{folder / INDEX} has {PACKED_RATE} samples per second, not {rate}")
        return tuple(read_packed(folder))
    files = sorted(folder.glob(WAVES))
    words = sorted({path.parent.name for path in folder.glob(f"*/{WAVES}")})
    words = [word for word in words if not word.startswith("_")]
    if files and words:
        raise GatesError(
            f"{folder} has {files[0].name} next to folders of words, such as {words[0]}: move "
            "either the files or the folders to another place"
        )
    if files:
        return tuple(recording(path.name, read_wave(path, rate)) for path in files)
    words = [*SC10] if {*SC10} <= {*words} else words
    made = tuple(
        Recording(f"{word}/{path.name}", word, "", number, read_wave(path, rate))
        for word in words
        for number, path in enumerate(sorted((folder / word).glob(WAVES)))
    )
    if not made:
        raise GatesError(
            f"{folder} has neither {INDEX}, nor *.wav, nor folders of them: name the folder of the "
            "recordings by --data.init_args.folder"
        )
    return made


def split_of(recordings: Sequence[Recording], held_out: str | None) -> list[Split]:
    """Return the split of every recording.

    Of digits, recordings 45 to 49 choose the weights. Those that test are 0 to 4 of every speaker,
    or all of one speaker, who then is nowhere else. Of words, 15 in 100 each choose and test.

    Args:
        recordings: Of digits with speakers, or of words without.
        held_out: Speaker who tests; None for the official split.

    Raises:
        GatesError: There is no such speaker, or no other one.
    """
    speakers = sorted({one.speaker for one in recordings})
    if held_out is not None and (held_out not in speakers or len(speakers) < 2):
        raise GatesError(
            f"data.held_out is {held_out!r}, expected one of several speakers: "
            f"{', '.join(speakers) if any(speakers) else 'the files name none'}"
        )
    if speakers == [""]:
        return _stratified([one.label for one in recordings])
    tests = [r.number in TESTED if held_out is None else r.speaker == held_out for r in recordings]
    return [
        "test" if test else "validation" if one.number in CHOSEN else "train"
        for one, test in zip(recordings, tests, strict=True)
    ]


def _stratified(labels: Sequence[str]) -> list[Split]:
    """Return splits of 70, 15 and 15 in 100 of every label, at random but always the same."""
    splits = np.full(len(labels), "train", dtype=object)
    for label in {*labels}:
        places = np.flatnonzero(np.array(labels) == label)
        order = np.random.default_rng(0).permutation(places)
        count = round(0.15 * len(order))
        splits[order[:count]], splits[order[count : 2 * count]] = "validation", "test"
    return list(splits)


class SpeechData(SequenceData):
    """Recordings as samples from -1 to 1, cut, with shifts and gains in training.

    Args:
        folder: See `read_speech`; `audio_folder` if None.
        held_out: Speaker who tests and is heard nowhere else; the official split if None.
        length: Samples after which a recording is cut, 256 or more.
        rate: Samples per second that WAV files must have.
        shift: Largest number of samples that a recording is moved in training.
        gain: Largest change of loudness in training, in decibels.
        batch_size: Sequences of a step over all ranks.
        seed: Of the order, shifts and gains.

    Raises:
        ValueError: A size is out of range.
    """

    needs = (
        "of digits, indices 0 to 4 test, 45 to 49 choose the weights, all others train; of each "
        "word, 15 in 100 recordings test, and as many choose"
    )

    def __init__(
        self,
        folder: str | None = None,
        held_out: str | None = None,
        length: int = 8000,
        rate: int = 8000,
        shift: int = 800,
        gain: float = 6.0,
        batch_size: int = 32,
        seed: int = 0,
    ) -> None:
        super().__init__(batch_size, seed)
        check_at_least(1, rate=rate)
        check_at_least(256, length=length)
        check_at_least(0, shift=shift, gain=gain)
        self.folder = audio_folder() if folder is None else Path(folder)
        self.held_out, self.length, self.rate = held_out, length, rate
        self.shift, self.gain = shift, gain
        self.augment = self._changed

    def read(self) -> Mapping[Split, Part]:
        """Read the recordings, and split them.

        Raises:
            GatesError: They cannot be read or split, or a class is not trained.
        """
        recordings = read_speech(self.folder, self.rate)
        self.classes = sorted({one.label for one in recordings})
        pairs = [*zip(recordings, split_of(recordings, self.held_out), strict=True)]
        if missing := {*self.classes} - {r.label for r, of in pairs if of == "train"}:
            raise GatesError(f"no recording of {min(missing)!r} trains: {self.needs}")
        return {name: self._part([r for r, of in pairs if of == name]) for name in SPLITS}

    def _part(self, chosen: Sequence[Recording]) -> Part:
        return Part(
            [waveform(one.samples, self.length) for one in chosen],
            np.array([self.classes.index(one.label) for one in chosen], dtype=np.int64),
            [one.name for one in chosen],
        )

    def setup(self, stage: str) -> None:
        """Read the recordings.

        Raises:
            GatesError: See `SequenceData.setup`; or, in stage ``test`` of the official split, a
                speaker has no recording that tests.
        """
        super().setup(stage)
        every = read_speech(self.folder, self.rate)
        untested = {one.speaker for one in every} - {r.speaker for r in every if r.number in TESTED}
        if untested and stage == "test" and self.held_out is None:
            raise GatesError(
                f"{', '.join(sorted(untested))} has no recording from 0 to 4, which test: number "
                "some so, let one speaker test by --data.init_args.held_out NAME, or evaluate with "
                "--speakers, where all recordings of each test once"
            )

    def _changed(self, x: NDArray[np.float32], draws: np.random.Generator) -> NDArray[np.float32]:
        """Return a recording later or earlier, and louder or softer; its length stays."""
        by = int(draws.integers(-self.shift, self.shift + 1))
        moved = np.pad(x, self.shift)[self.shift - by :][: len(x)]
        gain = 10 ** (draws.uniform(-self.gain, self.gain) / 20)
        return (moved * gain).astype(np.float32)


def waveform(samples: NDArray[np.int16], length: int) -> NDArray[np.float32]:
    """Return the first samples of a recording as numbers from -1 to 1."""
    return np.asarray(samples[:length], dtype=np.float32) / np.float32(FULL_SCALE)
