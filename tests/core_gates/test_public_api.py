import ast
import subprocess
import sys
from pathlib import Path

import pytest

import core_gates

FOREIGN = (
    "triton",
    "lightning",
    "torchmetrics",
    "timm",
    "torchvision",
    "transformers",
    "diffusers",
    "xarray",
    "pandas",
    "matplotlib",
    "scipy",
)


def run(code):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_the_package_imports_nothing():
    loaded = run("import sys, core_gates; print(*sorted(sys.modules))").split()
    assert "core_gates" in loaded
    assert "torch" not in loaded


def test_using_every_name_imports_pytorch_alone():
    loaded = run(
        "import sys, core_gates\n"
        "for name in core_gates.__all__: getattr(core_gates, name)\n"
        "print(*sorted(sys.modules))"
    ).split()
    assert {"torch", "core_gates.monitor.hooks", "core_gates.ops.silu_gate.op"} <= set(loaded)
    assert not {name.split(".")[0] for name in loaded} & set(FOREIGN)


def test_names_are_listed_once_and_alike():
    tree = ast.parse(Path(core_gates.__file__).read_text())
    imported = [
        alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("core_gates")
        for alias in node.names
    ]
    assert sorted(imported) == sorted(core_gates.__all__) == sorted(core_gates._HOMES)
    assert set(core_gates.__all__) <= set(dir(core_gates))


def test_public_objects_have_docstrings():
    for name in core_gates.__all__:
        assert getattr(core_gates, name).__doc__, name


def test_unknown_names_are_attribute_errors():
    with pytest.raises(AttributeError, match="has no attribute 'SoftMaxGate'"):
        core_gates.SoftMaxGate  # noqa: B018
