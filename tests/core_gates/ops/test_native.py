import os
import shutil

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing import assert_close

from core_gates import GatesError
from core_gates.ops import _native, gated_lora, gated_residual_norm, kernels
from core_gates.ops.gated_residual_norm import op


def total():
    x, v = torch.ones(2, 3), torch.ones(3)
    with kernels("cpp"):
        return gated_residual_norm(x, x, v, v, v)[0].sum().item()


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv(_native.CACHE_VARIABLE, str(tmp_path / "cache"))
    _native.library.cache_clear()
    yield tmp_path / "cache"
    _native.library.cache_clear()


@pytest.fixture
def source(tmp_path):
    """A kernel that is quickly compiled."""
    path = tmp_path / "op" / "kernel.cpp"
    path.parent.mkdir()
    path.write_text('extern "C" int number() { return 1; }')
    return path


def test_compiled_once_and_then_found_without_a_compiler(cache, cpp, ranks, monkeypatch):
    _native.library(op.SOURCE)
    files = list(cache.iterdir())
    assert [path.suffix for path in files] == [".so"]
    written = files[0].stat().st_mtime_ns
    monkeypatch.setenv("PATH", "")
    assert ranks(total, world_size=1) == [12.0]
    assert [path.stat().st_mtime_ns for path in cache.iterdir()] == [written]


def test_another_source_is_another_library(cache, cpp, source):
    assert _native.library(source).number() == 1
    source.write_text(source.read_text().replace("1", "2"))
    _native.library.cache_clear()
    assert _native.library(source).number() == 2


def test_without_a_compiler_there_is_one_line(cache, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(GatesError, match=r"found no no-such-compiler: install g.* in CXX"):
        _native.library(op.SOURCE)
    assert not cache.exists() or not list(cache.iterdir())


def test_a_source_that_does_not_compile_leaves_nothing(cache, cpp, source):
    source.write_text("not C++")
    with pytest.raises(GatesError, match=r"could not compile kernel.cpp of op: .*error.*; use"):
        _native.library(source)
    assert not list(cache.iterdir())


@pytest.mark.parametrize("damage", [b"", b"not a library"])
def test_a_damaged_library_is_built_again(damage, cache, cpp, source):
    path = cache / f"op-{_native._key(source)}.so"
    cache.mkdir(mode=0o700)
    path.write_bytes(damage)
    path.chmod(0o700)
    assert _native.library(source).number() == 1
    assert [file.name for file in cache.iterdir()] == [path.name]


@pytest.mark.parametrize("what", ["folder", "library"])
def test_what_others_may_write_is_not_run(what, cache, cpp, source):
    _native.library(source)
    (path,) = cache.iterdir()
    (cache if what == "folder" else path).chmod(0o777)
    _native.library.cache_clear()
    with pytest.raises(GatesError, match=r"others may write to .*: chmod go-w it, or"):
        _native.library(source)


@pytest.mark.parametrize("folder", ["file", "file/below"])
def test_a_folder_that_cannot_be_used_is_one_line(folder, cache, cpp, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(_native.CACHE_VARIABLE, str(tmp_path / folder))
    with pytest.raises(GatesError, match=r"cannot keep what it compiles: .*; name a folder that"):
        _native.library(op.SOURCE)


def test_the_compiler_may_have_arguments(cache, cpp, source, monkeypatch):
    path = next(filter(None, map(shutil.which, _native.COMPILERS)))
    monkeypatch.setenv("CXX", f"{path} -DNOTHING='a b'")
    assert _native.compiler() == [path, "-DNOTHING=a b"]
    _native.library(source)


def test_a_processor_that_the_compiler_does_not_know(cache, cpp, source, monkeypatch):
    known, calls = _native._call, []

    def call(command):
        calls.append("-march=native" in command)
        refuse = ["-march=no-such-processor"] if calls[-1] else []
        return known([*command, *refuse])

    monkeypatch.setattr(_native, "_call", call)
    _native.library(source)
    assert calls == [True, False]


def test_defaults_of_torch_do_not_reach_the_buffers(cpp):
    x, v = torch.randn(3, 4, dtype=torch.float32), torch.ones(4, dtype=torch.float32)
    h, up = torch.ones(3, 1), torch.ones(1, 64)
    base, coefficients = torch.randn(3, 64), torch.ones(5, 64)
    expected = gated_residual_norm(x, x, v, v, v), gated_lora(base, h, up, coefficients, [1])
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            found = gated_residual_norm(x, x, v, v, v), gated_lora(base, h, up, coefficients, [1])
    finally:
        torch.set_default_dtype(torch.float32)
    assert_close(found, expected, rtol=0, atol=0)


def test_tensors_without_memory_are_left_to_the_definition(cpp):
    with FakeTensorMode(), torch.no_grad():
        base, h, up = torch.ones(3, 64), torch.ones(3, 1), torch.ones(1, 64)
        assert gated_lora(base, h, up, torch.ones(5, 64), [1]).shape == (3, 64)
    with pytest.raises(TypeError, match=r"contiguous float32 or int64 .* got torch.float64"):
        _native.run_rows(None, [torch.ones(2, dtype=torch.float64)], 1, 1)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the system knows no fork")
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_forked_process_has_threads_of_its_own(cpp, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    x, v = torch.ones(400, 4), torch.ones(4)
    gated_residual_norm(x, x, v, v, v)
    child = os.fork()
    if child == 0:
        gated_residual_norm(x, x, v, v, v)
        os._exit(7)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
