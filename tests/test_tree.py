"""The tree: short files and functions, rooms where a folder grows, names that say one thing."""

import ast
import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = (
    "apps", "benchmarks", "core_gates", "diffusion", "endoscopy", "harness", "recsys", "studies",
    "video_multitask", "weather",
)  # fmt: skip
MODULES, LINES, FUNCTION_LINES = 16, 500, 60
LARGE = {"core_gates/gates"}  # one gate per file: the list of gates is what `ls` shows
NAMELESS = {"utils", "helpers", "common", "misc"}


def sources(package):
    files = sorted((ROOT / package).rglob("*.py"))
    assert files
    return files


def name_of(path):
    return path.relative_to(ROOT).as_posix()


def long_functions(source):
    """The functions of a module that are too long, docstrings included."""
    functions = (ast.FunctionDef, ast.AsyncFunctionDef)
    found = [node for node in ast.walk(ast.parse(source)) if isinstance(node, functions)]
    return [f.name for f in found if f.end_lineno - f.lineno + 1 > FUNCTION_LINES]


@pytest.mark.parametrize("package", PACKAGES)
@pytest.mark.fault("core S7")
def test_a_folder_that_grows_gets_rooms(package):
    folders = {file.parent for file in sources(package)}
    crowded = {
        name_of(folder)
        for folder in folders
        if len([m for m in folder.glob("*.py") if m.name != "__init__.py"]) > MODULES
    }
    assert crowded - LARGE == set()


@pytest.mark.parametrize("package", PACKAGES)
def test_no_file_is_named_like_its_folder_or_like_nothing(package):
    assert [name_of(f) for f in sources(package) if f.stem in {f.parent.name, *NAMELESS}] == []


@pytest.mark.parametrize("package", PACKAGES)
def test_files_are_short(package):
    long = [name_of(f) for f in sources(package) if len(f.read_text().splitlines()) > LINES]
    assert long == []


@pytest.mark.parametrize("package", PACKAGES)
def test_functions_are_short(package):
    long = {
        f"{name_of(file)}: {function}"
        for file in sources(package)
        for function in long_functions(file.read_text())
    }
    assert long == set()


def test_a_long_function_is_found():
    assert long_functions("def f():\n" + "    x = 1\n" * FUNCTION_LINES) == ["f"]


def test_the_harness_knows_no_domain():
    words = re.compile(r"weather|endoscop|polyp|forecast|assimilat|recsys|lora\b", re.IGNORECASE)
    assert [name_of(f) for f in sources("harness") if words.search(f.read_text())] == []


@pytest.mark.parametrize("app", ["weather", "endoscopy", "video", "diffusion"])
def test_applications_leave_engines_to_the_harness(app):
    engines = re.compile(r"L\.Trainer\(|ProcessPool|(from|import) safetensors|importlib\.resources")
    found = [name_of(f) for f in sources(f"apps/{app}") if engines.search(f.read_text())]
    assert found == []


def test_shipped_records_name_no_folder_of_a_machine():
    records = [path for package in PACKAGES for path in (ROOT / package).rglob("record.json")]
    assert len(records) > 100
    commands = {json.loads(path.read_text()).get("command", "") for path in records}
    assert [command for command in commands if "--root" in command or " /" in command] == []
