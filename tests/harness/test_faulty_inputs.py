"""The fixture ``faulty_inputs`` passes one-line refusals that leave all as it was, nothing else."""

from pathlib import Path

import pytest

GOOD = "gates toy score: error: --repeats must be at least 1, found 0\n"


@pytest.fixture
def answer(tmp_path):
    """``answer(code, err, write=name)`` returns a run that answers so and writes a file."""

    def make(code=2, err=GOOD, write=""):
        def run(*words):
            assert Path.cwd() == tmp_path
            if write:
                (tmp_path / write).write_text("something else")
            return code, "", err

        return run

    return make


FAULT = {"none": (("toy", "score", "--repeats", "0"), "must be at least 1, found 0")}


def test_a_refusal_in_one_line_passes(faulty_inputs, answer):
    faulty_inputs(FAULT, run=answer())


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"code": 0}, "none: exit code 0, expected 2"),
        ({"err": GOOD * 2}, "none: expected one line"),
        ({"err": ""}, "none: expected one line"),
        ({"err": f"{GOOD[:-1]}{'.' * 500}\n"}, "expected one line of less than 500 letters"),
        ({"err": f"{GOOD[:-1]} Traceback\n"}, "none: expected one line"),
        ({"err": GOOD.replace("score", "fit")}, "expected 'gates toy score: error: ...'"),
        ({"err": GOOD.replace("1", "2")}, "expected 'must be at least 1, found 0', found"),
        ({"write": "new"}, "none: it has changed new"),
        ({"write": "old/file"}, "none: it has changed old/file"),
    ],
)
def test_anything_else_fails(faulty_inputs, answer, tmp_path, given, said):
    (tmp_path / "old").mkdir()
    (tmp_path / "old/file").write_text("old")
    with pytest.raises(AssertionError) as error:
        faulty_inputs(FAULT | {"other": FAULT["none"]}, run=answer(**given))
    assert said in str(error.value)


def test_files_are_there_for_their_call_only(faulty_inputs, tmp_path):
    def run(*words):
        assert (tmp_path / "deep/a.yaml").read_text() == "x: 1"
        assert (tmp_path / "b").is_dir()
        return 2, "", "gates toy fit: error: bad\n"

    files = {"deep/a.yaml": "x: 1", "b": Path.mkdir}
    faulty_inputs({"one": (("toy", "fit"), "b.d", files)}, run=run)
    assert not (tmp_path / "deep/a.yaml").exists()
    assert not (tmp_path / "b").exists()


def test_the_front_door_is_called_by_default(faulty_inputs):
    faulty_inputs({"misspelled": (("weather", "fitt"), "did you mean fit")})


def test_an_empty_table_is_refused(refuses, faulty_inputs):
    refuses(AssertionError, ("the table of faults is empty", lambda: faulty_inputs({})))
