"""Small recordings: tones of a pitch a digit, in a folder of WAV files."""

import wave

import numpy as np
import pytest

SPEAKERS, DIGITS = ("ann", "bob", "eve"), range(3)
INDICES = (0, 5, 6, 7, 45)


def write_wave(path, samples, rate=8000, channels=1, width=2):
    with wave.open(str(path), "wb") as file:
        file.setparams((channels, width, rate, 0, "NONE", ""))
        file.writeframes(np.asarray(samples, dtype=f"<i{width}").tobytes())


def tone(digit, speaker, index):
    draws = np.random.default_rng([digit, SPEAKERS.index(speaker), index])
    time = np.arange(500 + 40 * index % 90) / 8000
    pitch = 400 * (digit + 1) * (1 + 0.1 * SPEAKERS.index(speaker))
    return 3000 * np.sin(2 * np.pi * pitch * time) + draws.normal(0, 30, len(time))


@pytest.fixture(scope="session")
def speech_folder(tmp_path_factory):
    """Files of three speakers and three digits; not to be changed."""
    folder = tmp_path_factory.mktemp("speech")
    for digit in DIGITS:
        for speaker in SPEAKERS:
            for index in INDICES:
                name = f"{digit}_{speaker}_{index}.wav"
                write_wave(folder / name, tone(digit, speaker, index))
    return folder


@pytest.fixture(scope="session")
def wave_writer():
    """``wave_writer(path, samples, rate=8000, channels=1, width=2)``."""
    return write_wave
