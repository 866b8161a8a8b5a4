"""Speech from the command line: a model that is trained, compared, continued and refused."""

import csv
import json
import lzma
import re

import pytest
import torch
from safetensors.torch import load_file

from apps.language.seqboat.pieces import module_of
from apps.language.seqboat.speech_study import (
    RATES,
    STRENGTHS,
    SpeechStudy,
    convolution_settings,
    headline,
)
from harness.evidence import Row
from harness.experiment.scores import Scores, write_scores
from harness.files.piece import read_record


@pytest.fixture
def few_trials(monkeypatch):
    """Two settings of every method, each tried for an epoch."""
    for name, value in {"RATES": RATES[3:], "STRENGTHS": STRENGTHS[3:], "TRIAL_EPOCHS": 1}.items():
        monkeypatch.setattr(f"apps.language.seqboat.speech_study.{name}", value)


def test_fit_logs_density_which_report_draws_and_keeps_the_best_weights(gates):
    out = gates.succeed("language", "fit", "--config", "small", "--model.learning_rate", "0.03").out
    run = gates.folder / "runs/language/small"
    assert out.splitlines()[-1] == "runs/language/small/weights/configured-s0"
    with (run / "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["validation/accuracy"]]
    assert len(rows) == 2
    assert all(0 <= float(row["density/layer2"]) <= 1 for row in rows)
    write_scores(run / "scores.json", Scores(), app="language", config_path=None)
    gates.succeed("language", "report", "--config", "small")
    page = (run / "report.html").read_text()
    assert page.count("No score is based on what fit trained") == 4  # in alternative texts, too
    rate = re.search(r"model.learning_rate</td>\s*<td[^>]*>([^<]*)", page)
    assert float(rate[1]) == 0.01  # of the configuration, not that of fit
    drawn = csv.DictReader((run / "figures/density-over-training.csv").read_text().splitlines())
    lines = [(one["series"], float(one["y"])) for one in drawn]
    assert lines == [(n, float(r[f"density/{n}"])) for n in ("layer1", "layer2") for r in rows]
    record = read_record(run / "weights/configured-s0")
    module = module_of(record.settings)
    weights = load_file(run / "weights/configured-s0/result.safetensors")
    best = torch.load(run / "checkpoints/best.ckpt", weights_only=True)["state_dict"]
    module.model.load_state_dict(weights)
    assert all(torch.equal(value, best[f"model.{name}"]) for name, value in weights.items())


@pytest.mark.costly("a model and its rivals are tuned and trained, of every speaker")
def test_evaluate_compares_with_rivals_by_recording_and_by_speaker(gates, few_trials):
    words = ("language", "evaluate", "--config", "small", "--trainer.max_epochs", "1")
    out = gates.succeed(*words).out
    scores = json.loads((gates.folder / "runs/language/small/scores.json").read_text())
    plain = {
        r["method"]: r for r in scores["rows"] if r["metric"] == "accuracy" and not r["versus"]
    }
    assert {*plain} == {"majority", "seqboat", "convolution", "spectrogram"}
    assert plain["majority"]["value"] == pytest.approx(1 / 3)
    assert plain["seqboat"]["n"] == 9
    assert {r["method"] for r in scores["rows"] if r["versus"] == "seqboat"} == {*plain} - {
        "seqboat"
    }
    assert "density of layer 2" in {r["metric"] for r in scores["rows"]}
    assert "On recordings never heard:" in out
    assert "come with the package" not in out
    assert "missing" not in gates.succeed(*words).out  # nothing is made again
    (gates.folder / "speech").rename(gates.folder / "heard")
    for file in gates.folder.glob("heard/*_0.wav"):
        file.unlink()  # those that test of the official split
    words = (*words, "--data.init_args.folder", "heard", "--name", "speakers", "--seeds", "0")
    assert "the test part has no sequence" in gates.refuse(*words)
    gates.succeed(*words, "--speakers")
    scores = json.loads((gates.folder / "runs/language/speakers/scores.json").read_text())
    of = {(r["task"], r["method"]): r for r in scores["rows"] if not r["versus"]}
    whole = of["speakers never heard", "seqboat"]
    each = [of[f"speaker {s}", "seqboat"]["value"] for s in ("ann", "bob", "eve")]
    assert whole["n"] == 3
    assert whole["value"] == pytest.approx(sum(each) / 3)


def test_notes_name_the_recordings_that_choose_the_settings(gates, wave_writer, monkeypatch):
    monkeypatch.setattr(SpeechStudy, "finish", lambda study: study._compare({}))
    for number in range(60):
        (path := gates.folder / f"words/word{number % 3}/{number}.wav").parent.mkdir(
            parents=True, exist_ok=True
        )
        wave_writer(path, [number, 1])
    said = {
        "speech": "recordings 45 to 49 of all speakers",
        "words": "15 in 100 recordings of each",
    }
    for folder, words in said.items():
        gates.succeed("language", "evaluate", "--config", "small", "--name", folder,
                      "--data.init_args.folder", folder)  # fmt: skip
        scores = json.loads((gates.folder / f"runs/language/{folder}/scores.json").read_text())
        assert [one in scores["notes"][0] for one in said.values()] == [
            one == words for one in said.values()
        ]


@pytest.mark.fault("48 hostile")
def test_regression_of_two_classes_is_scored_on_the_speaker_who_is_held_out(gates, few_trials):
    (gates.folder / "two").mkdir()
    for file in gates.folder.glob("speech/[01]_*"):
        file.rename(gates.folder / "two" / file.name)
    words = (
        "--data.init_args.folder",
        "two",
        "--model.model.init_args.outputs",
        "2",
        "--data.init_args.held_out",
        "eve",
    )
    gates.succeed("language", "evaluate", "--config", "small", *words, "--seeds", "0",
                  "--trainer.max_epochs", "1")  # fmt: skip
    scores = json.loads((gates.folder / "runs/language/small/scores.json").read_text())
    plain = (r for r in scores["rows"] if r["metric"] == "accuracy" and not r["versus"])
    rows = {r["method"]: r for r in plain}
    assert rows["spectrogram"]["n"] == 10
    assert rows["spectrogram"]["value"] == 1


@pytest.mark.costly("two processes, one of which is killed")
def test_a_killed_training_ends_with_the_same_bits(kill_and_resume, gates, monkeypatch):
    monkeypatch.chdir(gates.folder)
    words = ["language", "fit", "--config", "small.yaml", "--checkpoint.every_n_steps", "1"]
    kill_and_resume(words, app="language", kills=1)


@pytest.mark.slow
def test_a_killed_evaluation_ends_with_the_same_figures(kill_and_resume, gates, monkeypatch):
    monkeypatch.chdir(gates.folder)
    kill_and_resume(
        ["language", "evaluate", "--config", "small.yaml", "--seeds", "0"],
        app="language",
        seed=3,
        compare=["*/*/result.*", "*/*/record.json", "scores.json"],
    )


def test_the_help_of_a_decoder_names_that_of_seqboat(gates):
    said = "Options of a decoder. Those of SeqBoat: gates language fit --config fsdd --help\n"
    assert gates.succeed("language", "fit", "--help").out.startswith(said)
    assert said not in gates.succeed("language", "fit", "--config", "small", "-h").out


def test_the_rival_has_about_as_many_weights():
    settings = {
        "model.model.class_path": "language.seqboat.sequence_model.SeqBoat",
        "model.model.init_args.front.class_path": "language.seqboat.front_ends.FilterBank",
        "model.model.init_args.front.init_args.dim": 64,
        "model.model.init_args.outputs": 10,
    }
    own = {n: v for n, v in {**settings, **convolution_settings(settings)}.items() if v is not None}
    sizes = [sum(p.numel() for p in module_of(s).model.parameters()) for s in (settings, own)]
    assert abs(sizes[1] / sizes[0] - 1) < 0.06


def test_the_headline_says_who_wins():
    def row(method, value, versus="", low=0.0, high=0.0, p=1.0):
        return Row(method, "t", "accuracy", value, low, high, 9, versus, p)

    rows = [row("seqboat", 0.9), row("spectrogram", 0.95), row("majority", 0.1)]
    rows += [row("spectrogram", 0.05, "seqboat", 0.01, 0.09, 0.01)]
    rows += [row("majority", -0.8, "seqboat", -0.9, -0.7, 0.01)]
    assert headline(rows, "t") == (
        "On t: spectrogram 0.950, seqboat 0.900, majority 0.100; spectrogram beat SeqBoat; SeqBoat"
        " beats majority."
    )
    assert headline(rows[:3], "t").endswith("; no difference is clear.")


def test_faulty_calls_are_refused_in_one_line(gates, faulty_inputs):
    fit, evaluate = (["language", verb, "--config", "small"] for verb in ("fit", "evaluate"))
    data, model = "--data.init_args.", "--model.model.init_args."
    faulty_inputs(
        {
            "speaker": ([*fit, f"{data}held_out", "zoe"], "expected one of several speakers: ann"),
            "folder": ([*fit, f"{data}folder", "none"], "none has neither fsdd_index.json"),
            "batch": ([*fit, f"{data}batch_size", "99"], "27 training sequences fill no batch"),
            "window": ([*fit, f"{model}window", "0"], "window must be at least 1"),
            "rotary": (
                [*fit, f"{model}position", "rotary", f"{model}key_dim", "5"],
                "rotary positions turn pairs: key_dim must be even, got 5",
            ),
            "seeds": ([*evaluate, "--seeds", "-1"], "--seeds is .-1., expected one or more"),
            "twice": ([*evaluate, "--seeds", "0,0"], "expected one or more from 0, each once"),
            "classes": ([*fit, f"{model}outputs", "2"], "the data have 3 classes"),
        },
        folder=gates.folder,
    )


@pytest.mark.fault("48 bad inputs")
def test_faulty_recordings_are_refused_in_one_line(gates, faulty_inputs, wave_writer):
    def sound(samples=(1, 2, 3), until=None, **options):
        def write(path):
            wave_writer(path, samples, **options)
            path.write_bytes(path.read_bytes()[:until])

        return write

    def fault(words, write=None, name="new/0_ann_0", verb="fit", **others):
        run = ["language", verb, "--config", "small", "--data.init_args.folder"]
        return ([*run, name.partition("/")[0]], words, {f"{name}.wav": write or sound(), **others})

    ann = {
        f"untested/{digit}_ann_{n}.wav": sound([digit, n]) for digit in range(3) for n in (0, 5, 45)
    }
    packed = {"packed/fsdd_index.json": '{"names": ["1_a_0.wav"], "lengths": [2]}'}
    packed["packed/fsdd_pcm16_8k.delta.xz"] = lzma.compress(bytes(4))
    faulty_inputs(
        {
            "stereo": fault("has 2 channels, expected 1", sound(channels=2)),
            "rate": fault("has 22050 samples per second, expected 8000", sound(rate=22050)),
            "bits": fault("has 8 bits per sample, expected 16", sound(width=1)),
            "zero": fault("0_ann_0.wav has no samples", sound([])),
            "header": fault("has 0 samples, but its header says 3", sound(until=44)),
            "cut header": fault(r"samples \(it ends in its header\)", sound(until=30)),
            "cut": fault("has 2 samples, but its header says 3", sound(until=-2)),
            "digit": fault("10_ann_0.wav: expected DIGIT_SPEAKER_INDEX", name="new/10_ann_0"),
            "one class": fault("no recording of '0' trains"),
            "no test": fault(
                "eve has no recording from 0 to 4", None, "untested/1_eve_7", "evaluate", **ann
            ),
            "packed": fault("samples with SHA-256 .*, expected ", name="packed/0_ann_0", **packed),
        },
        folder=gates.folder,
    )


def test_a_training_on_another_split_is_not_resumed(gates):
    words = ("language", "fit", "--config", "small", "--trainer.max_epochs", "1")
    gates.succeed(*words)
    line = gates.refuse(*words, "--resume", "--data.init_args.held_out", "eve")
    assert "was trained with other settings (data.init_args.held_out" in line


def test_classify_says_what_is_heard_and_draws_where_layers_attend(gates, wave_writer):
    gates.succeed("language", "fit", "--config", "small")
    files = [f"speech/{name}.wav" for name in ("0_ann_0", "2_eve_6")]
    words = ("language", "classify", *files, "--name", "small")
    lines = gates.succeed(*words, "--output", "drawn").out.splitlines()
    assert [line.split("\t")[0] for line in lines] == [*files, "drawn"]
    label, chance = lines[0].split("\t")[1:3]
    assert label in {"0", "1", "2"}
    assert 1 / 3 <= float(chance) <= 1
    rows = list(csv.DictReader((gates.folder / "drawn/0_ann_0.csv").read_text().splitlines()))
    density = sum(int(row["layer2"]) for row in rows) / len(rows)
    assert f"{density:.0%}" == lines[0].partition("\tfirst")[0].split()[-1]
    assert lines[1].endswith("first 0.0625 s")  # 500 of 740 samples
    assert float(rows[1]["start_s"]) == 0.008
    assert (gates.folder / "drawn/2_eve_6.png").read_bytes()[:4] == b"\x89PNG"
    wave_writer(gates.folder / "fast.wav", [1, 2], rate=22050)
    (gates.folder / "other").mkdir()
    (gates.folder / "other/0_ann_0.wav").write_bytes((gates.folder / files[0]).read_bytes())
    for faulty, said in (
        ((*words, "--output", "drawn"), "drawn exists"),
        ((*words, "--output", "speech", "--overwrite_output"), "holds '0_ann_0.wav', which is no"),
        ((*words[:2], "fast.wav", "--name", "small"), "has 22050 samples per second"),
        ((*words[:3], "other/0_ann_0.wav", *words[4:], "--output", "x"), "two files have one name"),
        ((*words, "--weights", "speech"), "speech has no model of speech"),
        ((*words[:3], "--name", "none", "--root", "none"), "has no trained model"),
    ):
        assert said in gates.refuse(*faulty)
