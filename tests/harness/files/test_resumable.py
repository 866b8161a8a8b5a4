"""Work that survives a kill: continued, refused, or gone without a trace."""

import fcntl

import pytest

from core_gates.errors import GatesError
from harness.files import resuming


def make(target, steps, *, stop=None, overwrite=False, size=4):
    """Append a letter per step; ``stop`` ends the process of a kill at that step."""
    with resuming(target, {"size": size}, overwrite=overwrite) as partial:
        partial.content.mkdir(exist_ok=True)
        for step in range(partial.state.get("done", 0), size):
            if step == stop:
                raise KeyboardInterrupt
            steps.append(step)
            (partial.content / f"{step}.txt").write_text("abcd"[step])
            partial.save({"done": step + 1})


def content(target):
    return {path.name: path.read_text() for path in sorted(target.iterdir())}


WHOLE = {f"{n}.txt": "abcd"[n] for n in range(4)}


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_killed_work_is_continued(tmp_path):
    steps, target = [], tmp_path / "out"
    for stop in (1, 3):
        with pytest.raises(KeyboardInterrupt):
            make(target, steps, stop=stop)
        assert names(tmp_path) == [".out.partial"]
    make(target, steps)
    assert steps == [0, 1, 2, 3]  # none was done twice
    assert (names(tmp_path), content(target)) == (["out"], WHOLE)


def test_nothing_is_left_of_work_that_did_not_begin(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        make(tmp_path / "out", [], stop=0)
    assert names(tmp_path) == []


def test_other_settings_are_refused_and_replaced_only_when_asked(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        make(tmp_path / "out", [], stop=2)
    with pytest.raises(GatesError, match=r"begun with other settings \(size 4, now 3\): give"):
        make(tmp_path / "out", [], size=3)
    steps = []
    make(tmp_path / "out", steps, size=3, overwrite=True)
    assert (steps, len(content(tmp_path / "out"))) == ([0, 1, 2], 3)


def test_an_existing_target_stays_until_the_new_one_is_whole(refuses, tmp_path):
    target = tmp_path / "out"
    make(target, [], size=1)
    refuses(GatesError, ("out exists: choose another --output", lambda: make(target, [])))
    with pytest.raises(KeyboardInterrupt):
        make(target, [], stop=2, overwrite=True)
    assert content(target) == {"0.txt": "a"}
    make(target, [], overwrite=True)
    assert (content(target), names(tmp_path)) == (WHOLE, ["out"])


def test_two_processes_do_not_work_on_the_same(tmp_path):
    with (tmp_path / ".out.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(GatesError, match=r"another process is at work on .*out: wait for it"):
            make(tmp_path / "out", [])
    make(tmp_path / "out", [])


def test_a_damaged_state_begins_again(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        make(tmp_path / "out", [], stop=2)
    (tmp_path / ".out.partial/settings.json").write_text("{")
    steps = []
    make(tmp_path / "out", steps)
    assert steps == [0, 1, 2, 3]


def test_errors_of_other_files_are_not_blamed_on_the_target(tmp_path):
    with pytest.raises(FileNotFoundError, match="elsewhere"), resuming(tmp_path / "o", {}):
        (tmp_path / "elsewhere").read_text()
    (tmp_path / "file").write_text("x")
    with (
        pytest.raises(GatesError, match="cannot be written: Not a directory"),
        resuming(tmp_path / "file" / "o", {}),
    ):
        pass
    assert names(tmp_path) == ["file"]
