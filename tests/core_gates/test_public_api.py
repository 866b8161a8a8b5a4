"""What is public: on top all routing gates and what many need, the rest in the rooms."""

import ast
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

import core_gates
import core_gates.gates
import core_gates.ops
from core_gates import Gate

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
ROOT = Path(core_gates.__file__).parent
ROOMS = [*sorted(folder.parent.name for folder in ROOT.glob("*/__init__.py")), "conv", "surgery"]
LAZY = [core_gates, core_gates.gates, core_gates.ops]


def run(code):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def room(name):
    return importlib.import_module(f"core_gates.{name}")


def stubbed(package):
    """The names of a stub, and the modules that they are imported from."""
    tree = ast.parse(Path(package.__file__).with_suffix(".pyi").read_text())
    imports = [node for node in tree.body if isinstance(node, ast.ImportFrom)]
    return {
        alias.name: f"{package.__name__}.{node.module}"
        for node in imports
        for alias in node.names
        if node.level == 1 and alias.asname == alias.name
    }


def routing_gates():
    """The public classes of all files in ``gates/`` that choose or mix experts."""
    found = set()
    for file in (ROOT / "gates").glob("[!_]*.py"):
        module = importlib.import_module(f"core_gates.gates.{file.stem}")
        for name, kind in vars(module).items():
            defined = isinstance(kind, type) and kind.__module__ == module.__name__
            if defined and not name.startswith("_") and not issubclass(kind, tuple):
                found.add(name)
    return found


def test_the_package_imports_nothing_one_gate_few_operators_and_every_name_pytorch_alone():
    code = (
        "import importlib, sys, core_gates\n"
        "print(*sys.modules)\n"
        "core_gates.TopKGate\n"
        "print(*sys.modules)\n"
        f"for room in {[*reversed(ROOMS), '']}:\n"
        "    module = importlib.import_module(f'core_gates.{room}'.strip('.'))\n"
        "    for name in module.__all__: getattr(module, name)\n"
        "print(*sys.modules)"
    )
    first, second, third = (set(line.split()) for line in run(code).splitlines())
    assert "core_gates" in first
    assert "torch" not in first
    loaded = {name for name in second if name.startswith("core_gates.")}
    assert {n for n in loaded if n.startswith("core_gates.gates.")} == {"core_gates.gates.top_k"}
    assert len([n for n in loaded if n.endswith(".op")]) <= 2
    assert {"torch", "core_gates.monitor.hooks", "core_gates.ops.elementwise"} <= third
    assert not {name.split(".")[0] for name in third} & set(FOREIGN)


@pytest.mark.fault("core S6")
@pytest.mark.parametrize("package", LAZY, ids=lambda package: package.__name__)
def test_stub_and_package_agree(package):
    stub = stubbed(package)
    assert sorted(stub) == package.__all__
    assert set(package.__all__) <= set(dir(package))
    for name, home in stub.items():
        assert getattr(package, name) is getattr(importlib.import_module(home), name), name


@pytest.mark.fault("core S6")
def test_on_top_are_all_gates_and_few_other_names():
    gates = {*routing_gates(), "Gate"}
    assert {"CometGate", "MaskedMixture", "PreGate", "TopKGate"} <= gates
    assert gates <= set(core_gates.__all__)
    assert gates - {"Gate"} <= set(core_gates.gates.__all__)
    assert len(set(core_gates.__all__) - gates) <= 36


@pytest.mark.fault("core S6")
def test_the_names_on_top_are_those_of_the_rooms():
    rooms = [room(name) for name in [*ROOMS, "errors"]]
    for name in core_gates.__all__:
        assert any(getattr(module, name, None) is getattr(core_gates, name) for module in rooms)


@pytest.mark.fault("core S6")
def test_every_room_lists_its_names():
    assert {"attention", "gates", "moe", "ops", "routing", "surgery"} <= set(ROOMS)
    for name in ROOMS:
        names = room(name).__all__
        assert sorted(set(names)) == list(names), name
        for public in names:
            assert getattr(room(name), public).__doc__, f"{name}.{public}"


@pytest.mark.fault("core S6")
def test_the_reference_of_gates_has_every_gate():
    page = (ROOT.parent / "docs/reference/gates.md").read_text()
    words = set(re.findall(r"\w+", " ".join(re.findall(r"`([^`\n]+)`", page))))
    gates = {name for name in core_gates.__all__ if re.search("[a-z]Gate$", name)}
    assert len(gates) > 20
    assert sorted(gates - words) == []


def test_operators_are_functions_whatever_was_imported_before():
    run(
        "import core_gates.ops.norm_act.op\n"
        "from core_gates.ops.router import reference\n"
        "from core_gates.ops import norm_act, router, _select\n"
        "import core_gates.ops.gated_lora\n"
        "assert callable(norm_act) and callable(router)\n"
        "assert callable(core_gates.ops.gated_lora)\n"
        "assert reference.__name__ == 'core_gates.ops.router.reference'\n"
    )


@pytest.mark.parametrize("package", LAZY, ids=lambda package: package.__name__)
def test_unknown_names_are_attribute_errors(package):
    with pytest.raises(AttributeError, match="has no attribute 'SoftMaxGate'"):
        package.SoftMaxGate  # noqa: B018


def test_what_type_checkers_need_is_in_the_package():
    assert issubclass(core_gates.TopKGate, Gate)
    assert (ROOT / "py.typed").is_file()
    assert all(Path(package.__file__).with_suffix(".pyi").is_file() for package in LAZY)
