"""The help of every verb: short, plain, whole sentences."""

import ast
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


IMPORTS = """
import sys
for modules in ({}):
    for module in modules.split():
        __import__(module)
    print([m for m in sys.argv[1:] if m in sys.modules])
"""


@pytest.mark.costly("an interpreter that imports Lightning")
def test_verbs_of_video_do_not_wait_for_what_only_others_need():
    """Those without a training not for Lightning; none for libraries of baselines and services."""
    from apps.video.commands import FUNCTIONS

    functions = sorted({verb.target.partition(":")[0] for verb in FUNCTIONS.values()})
    stages = " ".join(["apps.video.commands", *functions]), "apps.video.training_verbs"
    slow = ["sklearn", "pandas", "onnx", "onnxruntime", "fastapi", "uvicorn"]
    slow += ["lightning", "torchvision", "matplotlib", "torch"]
    done = subprocess.run(
        [sys.executable, "-c", IMPORTS.format(f"{stages!r}"[1:-1]), *slow],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    functions, training = map(ast.literal_eval, done.stdout.splitlines())
    assert functions == ["torch"]
    assert not set(training) & set(slow[:6])
