"""Names on top of the packages: few, loaded when they are first used, typed by their stubs."""

import re
import subprocess
import sys
from importlib import import_module
from importlib.metadata import version
from pathlib import Path

import pytest

LIBRARIES = (
    "diffusion",
    "endoscopy",
    "language",
    "recsys",
    "studies",
    "video_multitask",
    "weather",
)
MOST = 10
ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("package", LIBRARIES)
def test_a_package_has_few_names_and_each_is_there(package):
    module = import_module(package)
    assert 2 <= len(module.__all__) <= MOST
    assert dir(module) == module.__all__
    for name in module.__all__:
        value = getattr(module, name)
        assert value.__module__.partition(".")[0] == package
        assert getattr(import_module(value.__module__), value.__name__) is value


@pytest.mark.parametrize("package", LIBRARIES)
def test_what_configurations_name_keeps_its_path(package):
    """jsonargparse records the shortest path of a class: results that ship would not be found."""
    module = import_module(package)
    files = [file for root in ("apps", *LIBRARIES) for file in (ROOT / root).rglob("*.yaml")]
    named = set(re.findall(r"class_path: *([\w.]+)", "".join(file.read_text() for file in files)))
    assert len(named) > 20
    values = [getattr(module, name) for name in module.__all__]
    classes = [value for value in values if value.__name__ in module.__all__]
    moved = named & {f"{value.__module__}.{value.__name__}" for value in classes}
    assert moved <= {"recsys.data.readers.own_table.OwnTable"}  # recorded by the short one


@pytest.mark.parametrize("package", ["core_gates", *LIBRARIES])
def test_the_version_is_that_of_the_distribution(package):
    assert import_module(package).__version__ == version("gatesuite")


def test_a_package_is_imported_without_its_libraries():
    heavy = "{'torch', 'lightning', 'numpy', 'pandas', 'polars', 'transformers'}"
    code = f"import sys, {', '.join(LIBRARIES)}; print(sorted({heavy} & set(sys.modules)))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout == "[]\n"


def test_a_name_that_is_not_there_is_refused():
    with pytest.raises(AttributeError, match=r"'weather' has no attribute 'Forecats'"):
        import_module("weather").Forecats  # noqa: B018
