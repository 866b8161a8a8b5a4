"""The wheel: built without a network, installed into an empty folder, run away from the clone."""

import subprocess
import sys
from email.parser import Parser
from pathlib import Path

import pytest

from apps.main import PACKAGES

ROOT = Path(__file__).parents[2]
WHEEL_PACKAGES = sorted(set(PACKAGES) - {"benchmarks"})
IMPORTS = f"""
from importlib import import_module
for name in {WHEEL_PACKAGES}:
    print(import_module(name).__file__)
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A folder that the wheel alone is installed into, and a function that runs its Python."""
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "--quiet", "--no-input", "--disable-pip-version-check"]
    build = [*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", folder, ROOT]
    subprocess.run(build, check=True)
    (wheel,) = folder.glob("gatesuite-*.whl")
    site = folder / "site"
    install = [*pip, "install", "--no-compile", "--no-deps", "--no-index", "--target", site, wheel]
    subprocess.run(install, check=True)

    def run(*arguments):
        return subprocess.run(
            [sys.executable, *arguments],
            cwd="/",
            env={"PATH": "/usr/bin:/bin", "HOME": str(folder), "PYTHONPATH": str(site)},
            capture_output=True,
            text=True,
        )

    run.site = site
    return run


def test_ten_packages_are_imported_from_the_wheel(installed):
    run = installed("-c", IMPORTS)
    places = {Path(line) for line in run.stdout.split()}
    assert places == {installed.site / name / "__init__.py" for name in WHEEL_PACKAGES}, run.stderr
    assert len(places) == 10
    assert not (installed.site / "benchmarks").exists()
    assert all((installed.site / name / "py.typed").exists() for name in WHEEL_PACKAGES)


def test_the_metadata_promise_what_is_there(installed):
    (file,) = installed.site.glob("gatesuite-*.dist-info/METADATA")
    metadata = Parser().parsestr(file.read_text())
    classifiers = {line.split(" :: ")[-1] for line in metadata.get_all("Classifier")}
    assert {"3.11", "3.12", "3.13", "Typed"} <= classifiers
    assert metadata.get_all("Project-URL") is None


@pytest.mark.costly("commands of the wheel run in new processes, which import PyTorch")
@pytest.mark.parametrize(
    ("words", "printed"),
    [
        ("--help", "usage: gates APP VERB"),
        ("doctor", "machine"),
        pytest.param(
            "study gaussian-rates --quick --root {root}", "largest change", marks=pytest.mark.slow
        ),
        ("language generate --weights shipped --prompt import --max_tokens 8", "import"),
    ],
)
def test_commands_run_from_the_wheel(installed, tmp_path, words, printed):
    run = installed(installed.site / "bin" / "gates", *words.format(root=tmp_path).split())
    assert run.returncode == 0, run.stderr
    assert printed in run.stdout
