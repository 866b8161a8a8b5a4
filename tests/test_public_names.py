"""Names on top of the packages: few, loaded when they are first used, typed by their stubs."""

import subprocess
import sys
from importlib import import_module
from importlib.metadata import version

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


@pytest.mark.parametrize("package", LIBRARIES)
def test_a_package_has_few_names_and_each_is_there(package):
    module = import_module(package)
    assert 5 <= len(module.__all__) <= MOST
    assert dir(module) == module.__all__
    for name in module.__all__:
        home = getattr(module, name).__module__
        assert home.partition(".")[0] == package
        assert getattr(import_module(home), name) is getattr(module, name)


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
