"""The scripts in ``examples``, run as they stand: short, and each ends in a picture or a table."""

from pathlib import Path

import pytest

EXAMPLES = sorted((Path(__file__).parents[2] / "examples").glob("*.py"))
LINES = 40
DAILY = "weather_analysis"


def test_there_is_one_for_the_core_and_one_for_each_application():
    subjects = {
        "core",
        "weather",
        "endoscopy",
        "recsys",
        "video",
        "diffusion",
        "language",
        "studies",
    }
    assert {example.stem.partition("_")[0] for example in EXAMPLES} == subjects
    assert all(len(one.read_text().splitlines()) <= LINES for one in EXAMPLES)
    assert all(one.read_text().startswith("# %% [markdown]\n# # ") for one in EXAMPLES)


@pytest.mark.parametrize(
    "example",
    [
        pytest.param(one, id=one.stem, marks=[pytest.mark.slow] * (one.stem != DAILY))
        for one in EXAMPLES
    ],
)
@pytest.mark.costly("imports its libraries, and trains or draws for seconds")
def test_an_example_ends_in_a_picture_or_a_table(example, forked, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    printed = forked.finished([str(example)], {"MPLBACKEND": "Agg"}, timeout=600)
    picture = tmp_path / f"{example.stem}.png"
    if picture.is_file():
        assert picture.stat().st_size > 10_000
    else:
        assert len(printed.splitlines()) >= 3
