import os
import subprocess
import sys

import pytest

from core_gates.errors import GatesError
from core_gates.ops import _native
from core_gates.ops.gated_residual_norm import native

SCRIPT = """
import torch
from core_gates.ops import kernels
from core_gates.ops.gated_residual_norm.op import gated_residual_norm
x, v = torch.ones(2, 3), torch.ones(3)
with kernels("cpp"):
    print(gated_residual_norm(x, x, v, v, v)[0].sum().item())
"""


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv(_native.CACHE_VARIABLE, str(tmp_path / "cache"))
    _native.library.cache_clear()
    yield tmp_path / "cache"
    _native.library.cache_clear()


def run(**environment):
    return subprocess.run(
        [sys.executable, "-c", SCRIPT],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )


def test_compiled_once_and_then_found_without_a_compiler(cache, cpp):
    _native.library(native.SOURCE)
    files = list(cache.iterdir())
    assert [path.suffix for path in files] == [".so"]
    written = files[0].stat().st_mtime_ns
    done = run(CXX="no-such-compiler")
    assert done.stdout == "12.0\n", done.stderr
    assert [path.stat().st_mtime_ns for path in cache.iterdir()] == [written]


def test_another_source_is_another_library(cache, cpp, tmp_path):
    source = tmp_path / "op" / "kernel.cpp"
    source.parent.mkdir()
    found = []
    for value in (1, 2):
        source.write_text(f'extern "C" int number() {{ return {value}; }}')
        _native.library.cache_clear()
        found.append(_native.library(source).number())
    assert found == [1, 2]


def test_without_a_compiler_there_is_one_line(cache, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(GatesError, match=r"found no no-such-compiler: install g.* in CXX"):
        _native.library(native.SOURCE)
    assert not cache.exists() or not list(cache.iterdir())


def test_a_source_that_does_not_compile_leaves_nothing(cache, cpp, tmp_path):
    source = tmp_path / "op" / "kernel.cpp"
    source.parent.mkdir()
    source.write_text("not C++")
    with pytest.raises(GatesError, match=r"could not compile kernel.cpp of op: .*error.*; use"):
        _native.library(source)
    assert not list(cache.iterdir())
