import abc
import dataclasses
import functools
import importlib
import json
import sys
from collections.abc import Sequence
from errno import ENOSPC
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

import pytest
import yaml

from apps.main import App, main
from core_gates import GatesError, SoftmaxGate
from harness.command.parser import one_line
from harness.command.verbs import FunctionVerb, run_verb

MOST_LETTERS = 500
QUICK = ["--trainer.max_steps", "2", "--trainer.enable_model_summary", "false"]
QUICK += ["--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false"]


@pytest.fixture
def gates(toy, tmp_path, monkeypatch, capsys):
    """Run ``gates toy ...`` in an empty folder; returns exit code and standard error."""
    monkeypatch.chdir(tmp_path)
    table = {"toy": App("toy", "a toy", {"fit": "train", "score": "score"})}

    def run(*words):
        try:
            code = main(["toy", *words], table)
        except SystemExit as leave:
            code = leave.code
        return code, capsys.readouterr().err

    return run


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("fit --trainer.max_epocs 3", "--trainer.max_epocs 3 (did you mean --trainer.max_epochs?)"),
        (
            "fit --trainer.max_epochs three",
            "trainer.max_epochs: expected int or null, found 'three'",
        ),
        ("fit --model.dim x", "model.dim: expected int, found 'x'"),
        ("fit --model.dim 0", "dim must be at least 1, got 0"),
        ("fit --checkpoint.mode least", "checkpoint.mode: expected 'min', 'max', found 'least'"),
        (
            "fit --checkpoint.every_n_steps 0",
            "checkpoint.every_n_steps must be at least 1, found 0",
        ),
        ("fit --trainer.accelerator gup", "accelerator='gup'"),
        (
            "fit --trainer.callbacks Nothing",
            "trainer.callbacks: expected list[Callback] or Callback",
        ),
        ("fit --config nowhere", "configuration 'nowhere' found neither in"),
        (
            "fit --config typo.yaml",
            "unknown key 'model.dimm' in typo.yaml (did you mean model.dim?)",
        ),
        ("fit --config broken.yaml", "broken.yaml line 3 is not valid YAML"),
        ("fit --config list.yaml", "list.yaml holds list, but a configuration is a mapping"),
        ("fit --config empty.yaml", "empty.yaml holds nothing, but a configuration is a mapping"),
        ("fit --config binary.yaml", "binary.yaml is not a text file"),
        (
            "fit --config class.yaml",
            "callbacks: lightning.pytorch.callbacks.Timer does not accept 'x'",
        ),
        ("score --config section.yaml", "section 'score' of the configuration must be a mapping"),
        ("fit --name a/b", "--name 'a/b' must be a plain name without '/'"),
        ("fit --resume --overwrite", "--resume and --overwrite exclude each other"),
        ("fit --ckpt_path none.ckpt", "no checkpoint at none.ckpt: run fit first"),
        (
            "fit --ckpt_path broken.yaml",
            "broken.yaml is damaged or not a checkpoint (UnpicklingError): give checkpoints",
        ),
        ("score --repeats many", "repeats: expected int, found 'many'"),
        ("score --repeats 0", "--repeats must be at least 1, found 0"),
        ("score --name", "argument --name: expected one argument"),
    ],
)
def test_wrong_input_is_one_line_with_the_fix(gates, tmp_path, words, expected):
    (tmp_path / "typo.yaml").write_text("model: {dimm: 3}\n")
    (tmp_path / "broken.yaml").write_text("model:\n  dim: [3\n")
    (tmp_path / "list.yaml").write_text("- 3\n")
    (tmp_path / "empty.yaml").write_text("")
    (tmp_path / "section.yaml").write_text("score: 3\n")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "class.yaml").write_text(
        "trainer: {callbacks: [{class_path: Timer, init_args: {x: 1}}]}\n"
    )
    code, err = gates(*words.split())
    verb = words.split()[0]
    assert code == 2
    assert err.startswith(f"gates toy {verb}: error: ")
    assert expected in err
    assert err.count("\n") == 1
    assert not (tmp_path / "runs").exists()


def test_a_run_folder_has_everything_and_is_refused_twice(gates, tmp_path):
    assert gates("fit", *QUICK, "--name", "a")[0] in (0, None)
    folder = tmp_path / "runs" / "toy" / "a"
    assert {p.name for p in folder.iterdir()} == {
        *("config.yaml", "environment.json", "record.json", "metrics.csv"),
        *("checkpoints", "tensorboard", "weights"),
    }
    assert json.loads((folder / "environment.json").read_text())["packages"]["torch"]
    config = (folder / "config.yaml").read_bytes()
    code, err = gates("fit", *QUICK, "--name", "a")
    assert code == 2
    assert "add --resume to continue, --overwrite to start again, or --name NEW" in err
    (folder / "scores.json").touch()
    assert gates("fit", *QUICK, "--name", "a", "--overwrite")[0] in (0, None)
    assert not (folder / "scores.json").exists()
    assert (folder / "config.yaml").read_bytes() == config


def test_the_stored_configuration_runs_again_identically(gates, tmp_path, same_checkpoint):
    gates("fit", *QUICK, "--name", "a", "--model.lr", "0.01", "--model.dim", "4")
    stored = tmp_path / "runs" / "toy" / "a" / "config.yaml"
    content = yaml.safe_load(stored.read_text())
    assert content["model"] == {"dim": 4, "lr": 0.01}
    assert not {"resume", "overwrite", "config"} & content.keys()
    gates("fit", "--config", str(stored), "--name", "b")
    again = tmp_path / "runs" / "toy" / "b"
    assert yaml.safe_load((again / "config.yaml").read_text()) == {**content, "name": "b"}
    same_checkpoint(*(f / "checkpoints" / "last.ckpt" for f in (stored.parent, again)))


def test_resume_takes_up_the_stored_configuration(gates, tmp_path):
    gates("fit", *QUICK, "--name", "a", "--model.dim", "4")
    folder = tmp_path / "runs" / "toy" / "a"
    assert gates("fit", "--name", "a", "--resume", "--trainer.max_steps", "5")[0] in (0, None)
    content = yaml.safe_load((folder / "config.yaml").read_text())
    assert (content["model"]["dim"], content["trainer"]["max_steps"]) == (4, 5)


def test_one_file_serves_every_verb(gates, tmp_path):
    (tmp_path / "both.yaml").write_text(
        "model: {dim: 4}\nscore: {repeats: 3}\nfit: {trainer: {max_steps: 1}, model: {lr: 5e-1}}\n"
        "trainer: {accelerator: cpu, enable_progress_bar: false, enable_model_summary: false}\n"
    )
    assert gates("fit", "--config", "both")[0] in (0, None)
    assert gates("score", "--config", "both")[0] in (0, None)
    folder = tmp_path / "runs" / "toy" / "both"
    assert json.loads((folder / "score.json").read_text()) == {"repeats": 3}
    content = yaml.safe_load((folder / "config.yaml").read_text())
    assert (content["model"], content["trainer"]["max_steps"]) == ({"dim": 4, "lr": 0.5}, 1)
    assert "repeats" not in content


def test_a_file_may_hold_nothing_for_a_verb(gates, tmp_path):
    (tmp_path / "c.yaml").write_text("fit: {model: {lr: 0.5}}\n")
    assert gates("score", "--config", "c.yaml")[0] in (0, None)


def test_the_command_line_wins_over_the_file(gates, tmp_path):
    (tmp_path / "c.yaml").write_text("score: {repeats: 3}\n")
    gates("score", "--config", "c.yaml", "--repeats", "7")
    assert json.loads((tmp_path / "runs/toy/c/score.json").read_text()) == {"repeats": 7}


def test_output_is_quiet_and_plain(toy, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    table = {"toy": App("toy", "a toy", {"fit": "train"})}
    words = ["--trainer.max_epochs", "1", "--trainer.enable_model_summary", "false"]
    main(["toy", "fit", *words, "--trainer.accelerator", "cpu"], table)
    captured = capfd.readouterr()
    assert captured.err == ""
    *lines, path = captured.out.splitlines()
    assert path == "runs/toy/default/weights/fit-s0"
    assert lines
    assert all(line.startswith("epoch 0  step ") for line in lines)


def test_help_of_a_verb_documents_its_arguments(gates, capsys, toy):
    with pytest.raises(SystemExit) as leave:
        main(["toy", "score", "--help"], {"toy": App("toy", "", {"score": "x"})})
    assert leave.value.code == 0
    text = capsys.readouterr().out
    assert "  --repeats INT                     How often to score. (default: 1)\n" in text
    assert "datamodule" not in text


def test_the_help_begins_with_data_and_model(toy, capsys):
    with pytest.raises(SystemExit):
        main(["toy", "score", "--help"], {"toy": App("toy", "", {"score": "x"})})
    text = capsys.readouterr().out
    lines = text.splitlines()
    assert lines[0] == "usage: gates toy score [--config FILE] [--key value ...]"
    options = ("--data.batch_size", "--model.dim", "--repeats", "--shipped", "--checkpoint.mode")
    places = [
        next(index for index, line in enumerate(lines) if line.lstrip().startswith(option))
        for option in options
    ]
    assert places == sorted(places)
    assert places[0] < 10
    assert "--trainer.devices" not in text


def test_the_help_of_what_trains_nothing_is_silent_on_trainings(toy, capsys):
    found = {}
    for verb in ("fit", "score"):
        with pytest.raises(SystemExit):
            main(["toy", verb, "--help"], {"toy": App("toy", "", dict.fromkeys((verb,), "x"))})
        found[verb] = capsys.readouterr().out
    for option in ("--resume", "--checkpoint.every_n_steps", "--checkpoint.folder"):
        assert option in found["fit"]
        assert option not in found["score"]
    assert "--checkpoint.monitor" in found["score"]  # a setting of results


def test_the_options_of_the_trainer_have_a_help_of_their_own(toy, capsys):
    with pytest.raises(SystemExit) as leave:
        main(["toy", "score", "--help.trainer"], {"toy": App("toy", "", {"score": "x"})})
    assert leave.value.code == 0
    text = capsys.readouterr().out
    assert "  --trainer.devices " in text
    assert "--model.dim" not in text


def test_switches_need_no_value(gates, toy, monkeypatch):
    seen = []

    def score(self, model: toy.ToyModule, datamodule: toy.ToyData, quick: bool = False) -> None:
        """Score.

        Args:
            model: Filled in by the command line.
            datamodule: Filled in by the command line.
            quick: Whether to be quick.
        """
        seen.append(quick)

    monkeypatch.setattr(toy.ToyTrainer, "score", score)
    for words in ([], ["--quick"], ["--quick", "false"], ["--quick", "--name", "a"]):
        assert gates("score", *words)[0] in (0, None)
    assert seen == [False, True, False, True]


@pytest.fixture
def seen(toy, monkeypatch):
    """What the verb ``score`` is given for arguments that are sequences."""
    found = []

    def score(
        self,
        model: toy.ToyModule,
        datamodule: toy.ToyData,
        seeds: tuple[int, ...] = (0, 1),
        densities: Sequence[float] = (0.5,),
        only: list[str] | None = None,
        pair: tuple[int, int] = (1, 2),
        kinds: tuple[Literal["one", "two"], ...] = ("one",),
        optional: Literal["one", "two"] | None = None,
    ) -> None:
        """Score.

        Args:
            model: Filled in by the command line.
            datamodule: Filled in by the command line.
            seeds: Some seeds.
            densities: Some shares.
            only: Some methods.
            pair: Two numbers.
            kinds: Some choices.
            optional: A choice.
        """
        found.append([tuple(seeds), tuple(densities), only, pair, kinds])

    monkeypatch.setattr(toy.ToyTrainer, "score", score)
    return found


@pytest.mark.fault("weather Be")
@pytest.mark.parametrize(
    ("words", "place", "value"),
    [
        ("--seeds 0", 0, (0,)),
        ("--seeds 0,1", 0, (0, 1)),
        ("--seeds=3,4", 0, (3, 4)),
        ("--seeds -1", 0, (-1,)),
        ("--seeds [0,2]", 0, (0, 2)),
        ("--seeds (0,2)", 0, (0, 2)),
        ("--densities 0.1", 1, (0.1,)),
        ("--densities 0.1,1e-2", 1, (0.1, 0.01)),
        ("--only oi", 2, ["oi"]),
        ("--only oi,letkf", 2, ["oi", "letkf"]),
        ("--only null", 2, None),
        ("--pair 3,4", 3, (3, 4)),
        ("--kinds two", 4, ("two",)),
        ("--kinds one,two", 4, ("one", "two")),
    ],
)
def test_sequences_need_no_brackets(gates, seen, words, place, value):
    assert gates("score", *words.split())[0] in (0, None)
    assert seen[0][place] == value


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("--seeds 0,x", "seeds: expected int, found 'x'"),
        ("--pair 3", "pair: expected"),
        ("--kinds three", "kinds: expected 'one', 'two', found 'three'"),
        ("--kinds one,three", "kinds: expected 'one', 'two', found 'three'"),
        ("--optional three", "optional: expected 'one', 'two' or null, found 'three'"),
    ],
)
def test_a_typo_in_fixed_choices_is_refused_with_the_choices(gates, seen, words, expected):
    code, err = gates("score", *words.split())
    assert code == 2
    assert f"gates toy score: error: {expected}" in err
    assert (err.count("\n"), seen) == (1, [])


@pytest.fixture
def needy(toy, monkeypatch):
    """The toy with an option that has no default."""

    class Needy(toy.ToyModule):
        def __init__(self, dim: int = 8, *, share: float) -> None:
            super().__init__(dim)

    monkeypatch.setattr(toy, "ToyModule", Needy)


@pytest.mark.fault("weather Bd")
@pytest.mark.parametrize(
    ("names", "words", "expected"),
    [
        (["b", "a"], "", "no configuration is named: give --config NAME: one of a, b, or a path"),
        ([], "", "no configuration is named: give --config NAME: a file with model.share"),
        ([], "--config c.yaml", "c.yaml lacks model.share"),
    ],
)
def test_a_call_without_configuration_is_told_their_names(
    gates, needy, monkeypatch, tmp_path, names, words, expected
):
    (tmp_path / "c.yaml").write_text("model: {dim: 3}\n")
    packaged = tmp_path / "packaged"
    packaged.mkdir()
    for name in names:
        (packaged / f"{name}.yaml").touch()
    monkeypatch.setattr("harness.command.configfile._packaged", lambda app: packaged)
    code, err = gates("fit", *words.split())
    assert (code, err) == (2, f"gates toy fit: error: {expected}\n")


class Unfinished(SoftmaxGate, abc.ABC):
    """A gate without its ``reset_parameters``."""

    @abc.abstractmethod
    def reset_parameters(self) -> None: ...


def raising(error):
    def construct():
        raise error

    return construct


SHOWS = "; --debug shows where\n"
ABSTRACT = "TypeError: Can't instantiate abstract class Unfinished "


@pytest.mark.fault("constructors")
@pytest.mark.parametrize(
    ("place", "construct", "start", "end"),
    [
        ("Module", lambda: Unfinished(4, 2), f"a constructor raised {ABSTRACT}", SHOWS),
        ("Module", raising(AssertionError()), "a constructor raised AssertionError", SHOWS),
        ("Data", raising(KeyError("a")), "a constructor raised KeyError: 'a'", SHOWS),
        (
            "Data",
            raising(RuntimeError("a\n  b " * 300)),
            "a constructor raised RuntimeError: a b a b",
            SHOWS,
        ),
        (
            "Trainer",
            raising(OSError("no file is named")),
            "a constructor raised OSError: no file is n",
            SHOWS,
        ),
        (
            "Module",
            lambda: importlib.import_module("harness.none"),
            "a constructor raised ModuleNot",
            SHOWS,
        ),
        (
            "Trainer",
            lambda: importlib.import_module("no_package"),
            "toy needs no_package: pip inst",
            "]'\n",
        ),
        (
            "Data",
            lambda: Path("none.csv").read_text(),
            "[Errno 2] No such file or directory: 'none.csv'",
            "'\n",
        ),
        (
            "Trainer",
            raising(OSError(ENOSPC, "full")),
            "No space left on device: free some",
            "--root\n",
        ),
        ("Data", raising(GatesError("found 3")), "found 3", "3\n"),
        ("Trainer", raising(ValueError("found 3")), "found 3", "3\n"),
    ],
)
def test_what_a_constructor_raises_is_one_line(
    gates, toy, monkeypatch, place, construct, start, end
):
    one = getattr(toy, f"Toy{place}")

    class Raising(one):
        @functools.wraps(one.__init__)
        def __init__(self, *args, **kwargs):
            construct()

    monkeypatch.setattr(toy, f"Toy{place}", Raising)
    code, err = gates("fit")
    assert code == 2
    assert err.startswith(f"gates toy fit: error: {start}")
    assert err.endswith(end)
    assert err.count("\n") == 1
    assert len(err) < MOST_LETTERS
    with pytest.raises((GatesError, OSError, ModuleNotFoundError)) as shown:
        gates("fit", "--debug")
    assert end != SHOWS or shown.value.__cause__.__traceback__ is not None


@dataclasses.dataclass
class Sized:
    """Options.

    Args:
        size: A size.
    """

    size: int = 3

    def __post_init__(self) -> None:
        if self.size < 0:
            raise ValueError("size is negative")
        self.part = 1 / self.size


def plan(sized: Sized) -> None:
    """Plan."""


@pytest.mark.fault("constructors")
def test_what_the_options_of_a_function_raise_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "planning", SimpleNamespace(plan=plan))
    verbs = {"plan": FunctionVerb("planning:plan", flat=("sized",))}
    for size, line in {
        "0": "^a constructor raised ZeroDivisionError: .*; --debug shows where$",
        "-1": "^an option is wrong: size is negative$",
    }.items():
        with pytest.raises(GatesError, match=line):
            run_verb("toy", verbs, ["plan", "--size", size], config="default")


@pytest.mark.fault("video V30")
@pytest.mark.parametrize(
    ("kinds", "told"),
    [
        ("[dict[str, float], <class 'NoneType'>]", "expected dict[str, float] or null, found 'x'"),
        ("[tuple, <class 'NoneType'>]", "expected a list, such as [a, b] or null, found 'x'"),
        ("[<class 'int'>, <class 'str'>]", "expected int or str, found 'x'"),
        ("[typing.Literal['a', 'b'], <class 'NoneType'>]", "expected 'a', 'b' or null, found 'x'"),
    ],
)
def test_types_are_told_as_they_are_written(kinds, told):
    said = f'Parser key "fused": Does not validate: Subtypes: {kinds} Errors: many Given value: x'
    assert one_line(said, ()) == f"fused: {told}"
