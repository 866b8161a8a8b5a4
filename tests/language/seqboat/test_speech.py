"""Recordings: what is read, what is refused, and who hears what."""

import json
import lzma
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from core_gates.errors import GatesError
from language.seqboat.sequences import SequenceLoader, TrainingLoader
from language.seqboat.speech import (
    INDEX,
    PACKED,
    SpeechData,
    read_packed,
    read_speech,
    read_wave,
    recording,
    split_of,
)
from language.seqboat.speech_rivals import log_spectrogram, regression, spectrograms

SHARED = Path(os.environ.get("GATES_SHARED", "../shared")) / "data/audio"


@pytest.mark.skipif(not SHARED.is_dir(), reason="the Free Spoken Digit Dataset is not there")
def test_the_packed_set_is_that_of_its_readme():
    recordings = read_packed(SHARED)
    assert len(recordings) == 3000
    lengths = [len(one.samples) for one in recordings]
    assert (sum(lengths), min(lengths), max(lengths)) == (10_498_424, 1_148, 18_262)
    splits = split_of(recordings, None)
    assert [splits.count(s) for s in ("train", "validation", "test")] == [2400, 300, 300]
    alone = split_of(recordings, "theo")
    assert [alone.count(s) for s in ("train", "validation", "test")] == [2250, 250, 500]
    assert {r.speaker for r, s in zip(recordings, alone, strict=True) if s == "test"} == {"theo"}


def test_recordings_are_those_of_the_shared_folder(speech_folder, tmp_path, monkeypatch):
    (tmp_path / "data").mkdir()
    (tmp_path / "data/audio").symlink_to(speech_folder)
    monkeypatch.setenv("GATES_SHARED", str(tmp_path))
    assert len(SpeechData().part("test").inputs) == 9


def test_files_are_read_as_they_are(speech_folder, wave_writer, tmp_path):
    samples = np.array([0, 1, -1, 32767, -32768])
    wave_writer(tmp_path / "a.wav", samples)
    assert read_wave(tmp_path / "a.wav", 8000).tolist() == samples.tolist()
    recordings = read_speech(speech_folder, 8000)
    assert len(recordings) == 45
    one = recordings[-1]
    assert (one.name, one.label, one.speaker, one.number) == ("2_eve_7.wav", "2", "eve", 7)
    for word in ("up", "down", "_noise_"):
        (tmp_path / "words" / word).mkdir(parents=True)
        for number in range(20):
            ending = "WAV" if number % 2 else "wav"
            wave_writer(tmp_path / f"words/{word}/{number}.{ending}", [number] * 9, rate=16000)
    words = read_speech(tmp_path / "words", 16000)
    assert {one.label for one in words} == {"up", "down"}
    splits = split_of(words, None)
    assert splits == split_of(words, None)
    assert [splits.count(s) for s in ("train", "validation", "test")] == [28, 6, 6]


def test_a_relative_folder_is_that_of_the_working_directory(tmp_path, wave_writer, monkeypatch):
    for number in (1, 2):
        (tmp_path / f"{number}/speech").mkdir(parents=True)
        wave_writer(tmp_path / f"{number}/speech/{number}_ann_0.wav", [number])
        monkeypatch.chdir(tmp_path / str(number))
        assert [one.label for one in read_speech(Path("speech"), 8000)] == [str(number)]


@pytest.mark.fault("48 hostile")
def test_names_of_speakers_may_be_those_of_people():
    for speaker in ("émile", "jean-luc", "josé_2"):
        assert recording(f"7_{speaker}_3.WAV", np.zeros(1, np.int16)).speaker == speaker


@pytest.mark.fault("48 hostile")
def test_classes_belong_to_what_was_trained(speech_folder, wave_writer, tmp_path):
    digests = []
    for names in (("ja", "nein"), ("aye", "nay"), ("ja", "nein")):
        for number, word in enumerate(names):
            (tmp_path / f"{len(digests)}/{word}").mkdir(parents=True)
            for one in range(10):
                wave_writer(tmp_path / f"{len(digests)}/{word}/{one}.wav", [number, one])
        data = SpeechData(str(tmp_path / str(len(digests))))
        digests.append([part.sha256 for part in data.digest()])
    assert digests[0] == digests[2] != digests[1]


def test_faulty_files_are_named(tmp_path, wave_writer, refuses, speech_folder):
    def faulty(name, samples=(1, 2, 3), **options):
        wave_writer(tmp_path / f"{name}.wav", samples, **options)
        return lambda: read_wave(tmp_path / f"{name}.wav", 8000)

    cut, header = faulty("cut", range(50)), faulty("header")
    (tmp_path / "cut.wav").write_bytes((tmp_path / "cut.wav").read_bytes()[:-20])
    (tmp_path / "header.wav").write_bytes((tmp_path / "header.wav").read_bytes()[:30])
    (tmp_path / "text.wav").write_text("no sound")
    (tmp_path / "odd").mkdir()
    wave_writer(tmp_path / "odd/seven_ann_1.wav", [1])
    (tmp_path / "one").mkdir()
    wave_writer(tmp_path / "one/7_ann_1.wav", [1])
    (tmp_path / "none").mkdir()
    (tmp_path / "both/up").mkdir(parents=True)
    for name in ("both/up/1.wav", "both/7_ann_1.wav"):
        wave_writer(tmp_path / name, [1])
    copies = tmp_path / "copies"
    shutil.copytree(speech_folder, copies)
    shutil.copy(copies / "0_ann_0.wav", copies / "0_ann_30.wav")
    (tmp_path / "packed").mkdir()
    (tmp_path / f"packed/{INDEX}").touch()
    read = read_speech(speech_folder, 8000)
    refuses(
        GatesError,
        ("stereo.wav has 2 channels, expected 1: convert it", faulty("stereo", channels=2)),
        ("has 22050 samples per second, expected 8000", faulty("fast", rate=22050)),
        ("has 8 bits per sample, expected 16", faulty("bits", width=1)),
        ("empty.wav has no samples", faulty("empty", [])),
        ("has 40 samples, but its header says 50", cut),
        ("header.wav is no WAV file", header),
        ("text.wav is no WAV file", lambda: read_wave(tmp_path / "text.wav", 8000)),
        ("cannot be read: No such file", lambda: read_wave(tmp_path / "gone.wav", 8000)),
        ("seven_ann_1.wav: expected DIGIT_SPEAKER", lambda: read_speech(tmp_path / "odd", 8000)),
        (
            "both has 7_ann_1.wav next to folders of words, such as up: move",
            lambda: read_speech(tmp_path / "both", 8000),
        ),
        ("none has neither fsdd_index.json", lambda: read_speech(tmp_path / "none", 8000)),
        ("expected one of several speakers: ann, bob, eve", lambda: split_of(read, "zoe")),
        ("has 8000 samples per second, not 16000", lambda: read_speech(tmp_path / "packed", 16000)),
        (
            "0_ann_0.wav, which tests, equals 0_ann_30",
            lambda: SpeechData(str(copies)).setup("test"),
        ),
        ("no recording of '7' trains", lambda: SpeechData(str(tmp_path / "one")).setup("fit")),
    )


def test_a_packed_file_of_other_samples_is_refused(tmp_path, refuses):
    (tmp_path / INDEX).write_text(json.dumps({"names": ["1_a_0.wav"], "lengths": [2]}))
    (tmp_path / PACKED).write_bytes(lzma.compress(bytes(4)))
    refuses(GatesError, ("samples with SHA-256 .*, expected ", lambda: read_packed(tmp_path)))
    (tmp_path / PACKED).write_bytes(lzma.compress(bytes(4))[:-9])
    refuses(GatesError, ("is damaged", lambda: read_packed(tmp_path)))


def test_batches_depend_on_seed_and_epoch_alone(speech_folder):
    data = SpeechData(str(speech_folder), batch_size=4, seed=3)
    data.setup("fit")
    part = data.part("train")
    assert len(part.inputs) == 27
    assert len(data.part("test").inputs) == 9
    assert not {*data.training_objects()} & {*data.test_objects()}

    def loader(**options):
        return TrainingLoader(part, 4, seed=3, augment=data.augment, **options)

    whole, again = loader(), loader()
    for some in (whole, again):
        some.set_epoch(2)
    batches = list(whole)
    assert len(batches) == 6
    assert all(batch.x.equal(other.x) for batch, other in zip(batches, again, strict=True))
    again.load_state_dict({"position": 4, "epoch": 2})
    for batch, rest in zip(batches[4:], again, strict=True):
        assert batch.x.equal(rest.x)
        assert batch.labels.equal(rest.labels)
    halves = [loader(rank=rank, world=2) for rank in (0, 1)]
    for half in halves:
        half.set_epoch(2)
    for batch, *parts in zip(batches, *halves, strict=True):
        for rank, one in enumerate(parts):
            assert batch.labels[rank::2].equal(one.labels)
    other = loader()
    assert any(not a.labels.equal(b.labels) for a, b in zip(other, batches, strict=True))
    seen = list(SequenceLoader(part, 4))
    assert sum(len(batch.labels) for batch in seen) == 27
    unchanged = seen[0].x[0][~seen[0].padding_mask[0]].numpy()
    assert np.array_equal(unchanged, part.inputs[0])


def test_shift_and_gain_keep_what_is_heard(speech_folder):
    data = SpeechData(str(speech_folder), shift=40, gain=6.0)
    x = data.part("train").inputs[0]
    for seed in range(6):
        changed = data.augment(x, np.random.default_rng(seed))
        draws = np.random.default_rng(seed)
        by, gain = int(draws.integers(-40, 41)), 10 ** (draws.uniform(-6, 6) / 20)
        moved = np.roll(x, by) * gain
        inside = slice(max(0, by), len(x) + min(0, by))
        np.testing.assert_allclose(changed[inside], moved[inside], rtol=1e-6)
        assert not np.delete(changed, np.arange(len(x))[inside]).any()


def test_regression_knows_tones_by_their_spectrogram(speech_folder):
    data = SpeechData(str(speech_folder), held_out="eve")
    one = log_spectrogram(data.part("train").inputs[0], 500)
    assert one.shape == (6, 65)
    assert abs(np.median(one.argmax(1)) * 8000 / 128 - 400) < 63  # ann says 0 at 400 Hz
    fitted = regression(data.part("train"), 500, 0.01)
    test = data.part("test")
    assert (fitted.predict(spectrograms(test, 500)) == test.labels).mean() > 0.7
