"""What a network hears in a spoken digit, and which of its tokens attend, for the tour."""

import time
from collections.abc import Callable

from apps.language.seqboat.activation_figure import activation_figure, activity, densities_of
from apps.language.seqboat.classify import FRONT, SHIPPED, opened
from apps.language.seqboat.pieces import DATA
from harness.report.page import Page, TourTask
from language.seqboat.speech import PACKED, audio_folder, read_packed, waveform

TASK, COMMAND = "recognize a spoken digit", "gates language classify"
CAPTION = (
    "A network hears a digit in a recording that it did not learn from (Free Spoken Digit Dataset, "
    "CC BY-SA 4.0). Below it the moments at which each layer attends."
)
NAME = "3_lucas_2.wav"  # one of those that test: no network that ships has learned from it


def digit_part() -> tuple[TourTask, list[Callable[[Page], object]]]:
    """Hear a digit of the Free Spoken Digit Dataset, which does not ship.

    It is looked for in `audio_folder`.

    Returns:
        The line of the table of tasks, and what adds the picture to the page, nothing without data.
    """
    started = time.monotonic()
    folder = audio_folder()
    if not (folder / PACKED).is_file():
        said = f"not shown: the Free Spoken Digit Dataset is missing, {folder / PACKED}"
        return TourTask(TASK, said, COMMAND, time.monotonic() - started), []
    model, record, classes = opened(SHIPPED / "fsdd/weights/seqboat-s0")
    rate, length, hop = (
        int(record.settings[name]) for name in (f"{DATA}rate", f"{DATA}length", f"{FRONT}hop")
    )
    recording = next(one for one in read_packed(folder) if one.name == NAME)
    chances, active = activity(model, sound := waveform(recording.samples, length))
    label, chance = classes[int(chances.argmax())], float(chances.max())
    figure = activation_figure(sound, active, rate, hop, f"{NAME}: {label}", chance)
    said = (
        f"hears a {label}, probability {chance:.2f}; tokens that attend, by layer: "
        f"{densities_of(active)}"
    )
    return TourTask(TASK, said, COMMAND, time.monotonic() - started), [
        lambda page: page.figure(figure, CAPTION, name="spoken-digit")
    ]
