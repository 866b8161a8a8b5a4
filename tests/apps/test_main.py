import importlib
import subprocess
import sys
from errno import ENOSPC

import pytest

from apps.main import APPS, App, main
from core_gates.errors import GatesError, MissingExtraError
from harness.command import GatesRunCLI


@pytest.mark.parametrize("unbuffered", ["", "-u"])
def test_a_reader_may_leave(unbuffered):
    run = f"{sys.executable} {unbuffered} -m apps.main --help"
    command = f"{{ sleep 0.3; {run}; echo $? >&2; }} | true"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, check=True)
    assert done.stderr.split() == ["141"]


def test_help_is_instant_and_imports_the_standard_library_only():
    code = (
        "import sys; before = set(sys.modules); from apps.main import main\n"
        "main(['--help']); main(['weather', '--help']); main([])\n"
        "new = set(sys.modules) - before\n"
        "print(sorted({name.partition('.')[0] for name in new} - sys.stdlib_module_names))\n"
        "print(len(new))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.count("usage: gates") == 3
    assert done.stdout.splitlines()[-2] == "['apps', 'core_gates']"  # its table of extras
    assert int(done.stdout.splitlines()[-1]) <= 50  # modules


def test_every_word_of_the_table_is_in_the_help(capsys):
    main(["--help"])
    overview = capsys.readouterr().out
    for name, app in APPS.items():
        assert f"  {name} " in overview
        assert app.summary in overview
        if app.verbs:
            main([name, "--help"])
            text = capsys.readouterr().out
            assert all(f"  {verb} " in text and line in text for verb, line in app.verbs.items())


@pytest.mark.parametrize("name", [name for name, app in APPS.items() if app.verbs])
def test_the_table_lists_the_verbs_that_exist(name):
    module = importlib.import_module(APPS[name].module)
    trainers = importlib.import_module(getattr(module, "TRAINERS", module.__name__))
    clis = {
        item
        for item in vars(trainers).values()
        if isinstance(item, type) and issubclass(item, GatesRunCLI) and item.app == name
    }
    of_functions = set(getattr(module, "FUNCTIONS", {}))
    of_trainers = {verb for cli in clis for verb in (*cli.verbs, *cli.other_verbs)}
    assert of_functions | of_trainers == set(APPS[name].verbs)
    whole = [cli for cli in clis if "report" in cli.verbs]  # others only train, another module
    assert len(whole) == 1 or (of_functions and not clis)
    assert all(cli.verbs == ("fit",) for cli in clis - set(whole))


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["wether"], "gates: error: unknown application 'wether' (did you mean weather?)"),
        (["weather", "fti"], "gates weather: error: unknown verb 'fti' (did you mean fit?)"),
        (
            ["video", "contest"],
            "gates video: error: unknown verb 'contest' (did you mean tune or evaluate?)",
        ),
        (["xyz"], "gates: error: unknown application 'xyz' (choose from "),
        (["doctor", "--now"], "gates doctor: error: doctor takes no arguments, found '--now'"),
        (["tour", "--only", "sea"], "gates tour: error: --only 'sea' is not a tour stop"),
    ],
)
def test_one_line_for_a_wrong_word(words, line, capsys):
    assert main(words) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith(line)
    assert captured.err.count("\n") == 1


class FakeModule:
    def __init__(self, error):
        self.error = error

    def main(self, arguments):
        if self.error:
            raise self.error
        return 0


@pytest.fixture
def front_door(monkeypatch):
    def run(error, *words):
        monkeypatch.setitem(sys.modules, "fake_app", FakeModule(error))
        return main(["fake", "go", *words], {"fake": App("fake_app", "x", {"go": "x"})})

    return run


def test_expected_failures_are_one_line(front_door, capsys):
    assert front_door(None) == 0
    assert front_door(GatesError("found 3,\n  expected 4")) == 2
    assert capsys.readouterr().err == "gates fake go: error: found 3, expected 4\n"
    assert front_door(MissingExtraError("weather", "xarray")) == 2
    assert "pip install 'gatesuite[weather]'" in capsys.readouterr().err
    assert front_door(KeyboardInterrupt()) == 130
    capsys.readouterr()
    assert front_door(FileNotFoundError(2, "No such file or directory", "a.nc")) == 2
    line = "gates fake go: error: [Errno 2] No such file or directory: 'a.nc'\n"
    assert capsys.readouterr().err == line
    assert front_door(OSError(ENOSPC, "No space left on device")) == 2
    assert "No space left on device: free some, or write elsewhere" in capsys.readouterr().err


def test_debug_and_defects_show_the_traceback(front_door):
    with pytest.raises(GatesError):
        front_door(GatesError("x"), "--debug")
    with pytest.raises(ZeroDivisionError):
        front_door(ZeroDivisionError())
    with pytest.raises(OSError, match="no file is named"):
        front_door(OSError("no file is named"))


def test_a_missing_package_names_the_extra(tmp_path, monkeypatch, capsys):
    (tmp_path / "needy_app.py").write_text("import a_package_that_is_missing\n")
    monkeypatch.syspath_prepend(tmp_path)
    table = {"weather": App("needy_app", "x", {"go": "x"}, extras=("sky", "sea"))}
    assert main(["weather", "go"], table) == 2
    line = "sky needs a_package_that_is_missing: pip install 'gatesuite[sky]'"
    assert capsys.readouterr().err == f"gates weather go: error: {line}\n"


def test_a_package_that_is_missing_later_names_the_extra_too(front_door, capsys):
    assert front_door(ModuleNotFoundError("no", name="far_away.part")) == 2
    line = "fake needs far_away: pip install 'gatesuite[fake]'"
    assert capsys.readouterr().err == f"gates fake go: error: {line}\n"
    with pytest.raises(ModuleNotFoundError):
        front_door(ModuleNotFoundError("no", name="harness.nothing"))
