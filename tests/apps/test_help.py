"""The help of every verb: short, plain, whole sentences."""

import contextlib
import functools
import io
import re
import subprocess
import sys

import pytest

from apps.language.commands import OFFLOAD
from apps.main import APPS, main

VERBS = [(name, verb) for name, app in APPS.items() for verb in app.verbs if verb != "offload"]
VERBS += [("language", verb) for verb in OFFLOAD]


@pytest.fixture(autouse=True)
def _terminal(monkeypatch):
    """A terminal of 100 columns, whatever this process runs in."""
    monkeypatch.setenv("COLUMNS", "100")


@functools.cache
def text_of(*words):
    out = io.StringIO()
    with contextlib.redirect_stdout(out), pytest.raises(SystemExit) as leave:
        main([*words])
    assert leave.value.code == 0
    return out.getvalue()


@pytest.mark.fault("endoscopy D16")
@pytest.mark.parametrize("name", ["weather", "endoscopy", "video"])
def test_the_help_of_fit_is_short(name):
    assert len(text_of(name, "fit", "--help").splitlines()) <= 150


@pytest.mark.fault("endoscopy D16")
@pytest.mark.parametrize(("name", "verb"), VERBS)
def test_the_help_is_plain_text_within_100_columns(name, verb):
    text = text_of(name, *verb.split(), "--help")
    assert max(map(len, text.splitlines())) <= 100
    assert re.search(r"`|:(class|func|data|mod|meth):|torch\\.nn|==SUPPRESS==", text) is None


@pytest.mark.fault("endoscopy D16")
@pytest.mark.parametrize(("name", "verb"), VERBS)
def test_options_are_described_by_sentences(name, verb):
    lines = text_of(name, *verb.split(), "--help").split("\n\n", 1)[1]
    options = re.findall(
        r"^  ((?:--\w|[A-Z_]+ ).*?)(?=^  (?:-|[A-Z_]+ )|^\S|\Z)", lines, flags=re.M | re.S
    )
    assert len(options) >= 3
    assert "default: ..." not in lines
    assert "Filled in" not in lines
    assert [" ".join(option.split()) for option in options if not sentence(option)] == []


def sentence(option):
    """Whether the help of an option is one: three words or more, from no preposition to a stop."""
    text = re.split(r"\s{2,}", option.strip(), maxsplit=1)[1]
    text = re.sub(r" \((required|known|default).*", "", " ".join(text.split()))
    begins = re.match(r"(Of|At|In|For|By|To) ", text) is None
    return begins and text.endswith(".") and len(text.split()) >= 3


def imported(module, names):
    """Those of the names that importing a module imports."""
    code = f"import sys, {module}; print(*[m for m in sys.argv[1:] if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code, *names], capture_output=True, text=True, check=True
    )
    return done.stdout.split()


@pytest.mark.costly("an interpreter a verb")
def test_help_of_video_does_not_wait_for_what_only_baselines_and_services_need():
    slow = ["sklearn", "pandas", "onnx", "onnxruntime", "fastapi", "uvicorn"]
    assert imported("apps.video.training_verbs", slow) == []


def test_verbs_of_video_without_a_training_do_not_wait_for_lightning():
    from apps.video.commands import FUNCTIONS

    modules = ", ".join(sorted({verb.target.partition(":")[0] for verb in FUNCTIONS.values()}))
    slow = ["lightning", "torchvision", "matplotlib", "torch"]
    assert imported(f"apps.video.commands, {modules}", slow) == ["torch"]
