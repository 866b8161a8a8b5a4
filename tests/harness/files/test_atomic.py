"""Outputs are the old ones or the new ones, whatever happens in between."""

import json
import math
import os
import subprocess
from contextlib import suppress
from functools import partial
from pathlib import Path

import pytest

from core_gates.errors import GatesError
from harness.files import content_digest, replacing, require_free, short_digest, write_json


def test_a_file_is_replaced_only_when_the_block_ends_well(tmp_path):
    path = tmp_path / "a" / "table.csv"
    with replacing(path) as temporary:
        assert temporary.suffix == ".csv"
        temporary.write_text("old")
    with suppress(ZeroDivisionError), replacing(path) as temporary:
        temporary.write_text("half")
        temporary.write_text(str(1 / 0))
    assert path.read_text() == "old"
    with replacing(path) as temporary:
        temporary.write_text("new")
    assert (path.read_text(), [one.name for one in path.parent.iterdir()]) == ("new", ["table.csv"])


def test_a_folder_is_replaced_whole(tmp_path):
    path = tmp_path / "weights"
    for number in range(2):
        with replacing(path) as temporary:
            temporary.mkdir()
            (temporary / f"{number}.bin").write_bytes(b"x")
    assert [one.name for one in path.iterdir()] == ["1.bin"]
    assert [one.name for one in tmp_path.iterdir()] == ["weights"]


def test_a_file_takes_the_place_of_no_folder(refuses, tmp_path):
    (path := tmp_path / "weights").mkdir()
    (path / "kept.bin").touch()
    refuses(
        GatesError,
        ("weights is a folder, a file is written", lambda: write_json(path, {})),
        (
            "weights is a folder, a file is written",
            lambda: require_free(path, overwrite=True, file=True),
        ),
    )
    assert (path / "kept.bin").is_file()


def test_a_folder_that_a_kill_left_aside_comes_back(tmp_path):
    path = tmp_path / "weights"
    (tmp_path / ".weights.previous").mkdir()
    (tmp_path / ".weights.previous" / "kept.bin").touch()
    with pytest.raises(ValueError, match="again"), replacing(path):
        raise ValueError("again")
    assert (path / "kept.bin").is_file()


def test_what_a_killed_process_has_left_goes_at_the_next_write(tmp_path):
    ended = subprocess.Popen(["true"])
    ended.wait()
    (tmp_path / f".table.{ended.pid}.partial.csv").touch()
    (tmp_path / ".table.1.partial.csv").touch()  # of a process that is at work
    with replacing(tmp_path / "table.csv") as temporary:
        temporary.touch()
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"table.csv", ".table.1.partial.csv"}


def test_json_has_no_nan(tmp_path):
    path = write_json(tmp_path / "a.json", {"a": [math.nan, 1.0], "b": (math.inf,)})
    assert json.loads(path.read_text()) == {"a": [None, 1.0], "b": [None]}


def test_a_place_below_a_file_is_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(GatesError, match="is a file and no folder"):
        require_free(tmp_path / "file" / "out", overwrite=True)


@pytest.mark.fault("diffusion D10")
def test_a_place_that_may_not_be_looked_at_is_refused(tmp_path):
    (tmp_path / "closed").mkdir(mode=0)
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    try:
        with pytest.raises(GatesError, match=r"/out cannot be written: Permission denied$"):
            require_free(tmp_path / "closed" / "out", overwrite=True)
    finally:
        os.seteuid(user)
    with pytest.raises(GatesError, match=r"cannot be written: File name too long$"):
        require_free(tmp_path / ("x" * 300), overwrite=False)


@pytest.mark.fault("diffusion D10")
def test_a_folder_that_may_not_be_written_is_refused_at_once(tmp_path):
    with pytest.raises(GatesError, match=r"^/proc/below/out cannot be .*: choose another OUT$"):
        require_free(Path("/proc/below/out"), overwrite=True, option="OUT")
    require_free(tmp_path / "below" / "out", overwrite=True)
    assert not list(tmp_path.iterdir())


def test_contents_are_told_apart_by_names_and_bytes(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a").write_text("same")
    assert content_digest(tmp_path / "one") == content_digest(tmp_path / "two")
    (tmp_path / "one" / ".b.partial").mkdir()
    (tmp_path / "one" / ".b.partial" / "c").write_text("hidden")
    assert content_digest(tmp_path / "one") == content_digest(tmp_path / "two")
    (tmp_path / "two" / "a").write_text("else")
    assert content_digest(tmp_path / "one").sha256 != content_digest(tmp_path / "two").sha256
    one, two = (content_digest(tmp_path / n, listed_above=3) for n in ("one", "two"))
    assert one.listing
    assert one == two  # names and sizes agree
    assert content_digest(tmp_path / "one" / "a").size == 4
    assert short_digest({"a": 1, "b": 2}) == short_digest({"b": 2, "a": 1}) != short_digest({})


@pytest.mark.fault("video H9")
def test_a_place_that_cannot_be_written_is_named(refuses, tmp_path):
    file = tmp_path / "file"
    file.touch()
    for place in (Path("/proc/absent.json"), file / "below.json"):
        refuses(GatesError, (f"^{place} cannot be written: [A-Z]", partial(write_json, place, {})))

    def read():
        with replacing(tmp_path / "new.json"):
            (tmp_path / "absent.json").read_text()

    refuses(FileNotFoundError, (r"absent\.json", lambda: read()))


def test_two_processes_that_swap_one_folder_are_told_apart(refuses, tmp_path):
    """Another one has moved its folder aside, and put its new one here, while this one wrote."""
    path, aside = tmp_path / "store.zarr", tmp_path / ".store.zarr.previous"

    def swap():
        with replacing(path) as temporary:
            for folder in (temporary, path, aside):
                folder.mkdir()
                (folder / "array").write_text(folder.name)

    refuses(GatesError, ("another process at the same time: run one command after", lambda: swap()))
    assert (path / "array").read_text() == "store.zarr"
    assert {one.name for one in tmp_path.iterdir()} == {path.name, aside.name}
