import atexit
import gc
import os
import runpy
import sys
from importlib.machinery import PathFinder
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import settings

# Else each of some hundred processes compiles the tree again, and each worker rewrites assertions.
sys.dont_write_bytecode = False
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
os.environ.setdefault("TRITON_INTERPRET", "1")  # read once, when triton is first imported
os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")

HERE = Path(__file__).parent
FEW = 6  # cases of a function that all run daily
COMMANDS = {"apps", "distributed", "e2e"}  # folders whose cases start commands or processes

# No deadline, because other processes share the cores; the same examples on every run.
settings.register_profile("tests", deadline=None, derandomize=True)
settings.load_profile("tests")


@pytest.fixture(scope="session")
def ranks():
    """``ranks(function, *args, world_size=2, timeout=120)`` runs a function on gloo processes."""
    return runpy.run_path(str(HERE / "fixtures" / "launch.py"))["run_on_ranks"]


@pytest.fixture(scope="session")
def two_ranks(ranks):
    """Hold ``function(parallel, *args)`` on two gloo processes against one process."""
    return runpy.run_path(str(HERE / "fixtures" / "two_ranks.py"))["comparer"](ranks)


@pytest.fixture(scope="session")
def refuses():
    """``refuses(error, (line, call), ...)``: each call raises an error that matches."""

    def check(error, *cases):
        for line, call in cases:
            try:
                with pytest.raises(error, match=line):
                    call()
            except pytest.fail.Exception as failure:
                pytest.fail(f"{line!r}: {failure}")

    return check


@pytest.fixture(scope="session")
def refused():
    """``refused(words, call, ...)``: the message of its GatesError, one line that matches."""
    from core_gates.errors import GatesError

    def check(words, call, *given, error=GatesError, **options):
        with pytest.raises(error, match=words) as caught:
            call(*given, **options)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    return check


@pytest.fixture(scope="session")
def count_calls():
    """``count_calls(function)``: its result, and how many functions it calls, however long."""

    def count(function):
        calls = 0

        def seen(frame, event, argument):
            nonlocal calls
            calls += event in ("call", "c_call")

        sys.setprofile(seen)
        try:
            return function(), calls
        finally:
            sys.setprofile(None)

    return count


@pytest.fixture(scope="session")
def largest():
    """``with largest(*given) as made``: ``made.elements`` of the largest tensor but the given."""
    return runpy.run_path(str(HERE / "fixtures" / "largest.py"))["Largest"]


@pytest.fixture
def absent(monkeypatch):
    """``absent(name)``: a library is not installed."""

    def remove(name):
        find = PathFinder.find_spec

        def find_spec(fullname, path=None, target=None):
            return None if fullname.partition(".")[0] == name else find(fullname, path, target)

        for module in [one for one in sys.modules if one.partition(".")[0] == name]:
            monkeypatch.delitem(sys.modules, module)
        monkeypatch.setattr(PathFinder, "find_spec", staticmethod(find_spec))

    return remove


@pytest.fixture
def faulty_inputs(tmp_path):
    """Hold every call of a table of faults to exit code 2, one line and an unchanged folder."""
    return runpy.run_path(str(HERE / "fixtures" / "faulty_inputs.py"))["checker"](tmp_path)


@pytest.fixture(scope="session")
def _harness():
    return runpy.run_path(str(HERE / "fixtures" / "kill_and_resume.py"))


@pytest.fixture
def kill_and_resume(tmp_path, _harness, forked):
    """Kill a ``fit``, resume it, and compare it bit for bit with an uninterrupted run."""
    return _harness["harness"](tmp_path, forked.Forked)


@pytest.fixture(scope="session")
def forked():
    """``Forked`` commands and ``finished`` ones, without the time that imports take."""
    return SimpleNamespace(**runpy.run_path(str(HERE / "fixtures" / "forked.py")))


@pytest.fixture
def launch_files(tmp_path):
    """``launch_files(folder)``: what the launch files of an application hand to torchrun, srun."""
    found = runpy.run_path(str(HERE / "fixtures" / "launch_files.py"))
    return lambda folder: found["LaunchFiles"](folder, tmp_path)


@pytest.fixture(scope="session")
def legible():
    """Assert that the words of a figure lie inside it and do not touch."""
    return runpy.run_path(str(HERE / "fixtures" / "legible.py"))["check"]


@pytest.fixture(scope="session")
def shop():
    """A bookshop: rows, requests and untrained models."""
    return SimpleNamespace(**runpy.run_path(str(HERE / "fixtures" / "shop.py")))


@pytest.fixture(scope="session")
def model_folder(shop, tmp_path_factory):
    """The folder of an untrained model of the shop; not to be changed."""
    return shop.write_model(tmp_path_factory.mktemp("models") / "shop")


@pytest.fixture
def same_checkpoint(_harness):
    """Assert that two checkpoints hold the same bits."""
    return _harness["assert_same_checkpoint"]


class Backwards(pytest.Dir):
    """A folder whose last file is imported first."""

    def collect(self):
        return reversed([*super().collect()])


def pytest_collect_directory(path, parent):
    """Two workers begin at the two ends: each reads half of the bytecode that the other writes."""
    if os.environ.get("PYTEST_XDIST_WORKER") == "gw1":
        return Backwards.from_parent(parent, path=path)
    return None


def pytest_configure(config):
    config.option.loadscopereorder = False  # files run in the order given below
    config.pluginmanager.register(
        runpy.run_path(str(HERE / "fixtures" / "cost.py"))["CostOfTests"]()
    )


def pytest_collection_finish():
    gc.freeze()  # else all that was collected is searched for garbage again, by pytest at the end
    atexit.register(gc.unfreeze)  # libraries in C++ report what the interpreter does not free
    gc.set_threshold(20_000, 20, 20)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Files that start commands come first, so that no long one is left for one core at the end."""
    items.sort(key=lambda item: (item.path.relative_to(HERE).parts[0] not in COMMANDS, item.path))
    cases = {}
    for item in items:
        if {"ranks", "two_ranks"} & set(getattr(item, "fixturenames", ())):
            item.add_marker("distributed")
        if hasattr(item, "callspec") and not item.get_closest_marker("slow"):
            cases.setdefault(item.nodeid.partition("[")[0], []).append(item)
    for function in cases.values():
        for item in set(function) - daily(function):
            item.add_marker("slow")


def daily(cases):
    """The cases of a function that run daily, which stand for the others.

    Where a case starts a command, or the function is marked `ends`, these are the first and the
    last one. Elsewhere a function of more than FEW cases keeps the last one and every one in which
    an argument has a value for the first time: a table is tested whole, of a product each value
    once.
    """
    first = cases[0]
    if first.path.relative_to(HERE).parts[0] in COMMANDS or first.get_closest_marker("ends"):
        return {first, cases[-1]}
    values, kept = set(), {cases[-1]}
    for case in cases:
        own = {(name, repr(value)) for name, value in case.callspec.params.items()}
        kept |= set() if own <= values else {case}
        values |= own
    return kept if len(cases) > FEW else set(cases)
