"""The first run that the page of weather shows prints what the page says."""

import re
import shlex
from pathlib import Path

import pytest

PAGE = (Path(__file__).parents[2] / "docs/guide/weather.md").read_text()


def blocks():
    """Commands of the first code block of the section, each with the lines that it prints."""
    section = PAGE.partition("## A first run")[2]
    (block,) = re.findall(
        r"```\n(\$ gates weather prepare --config era5.*?)```", section, re.DOTALL
    )
    found = []
    for part in block.replace("\\\n", " ").split("$ gates ")[1:]:
        command, _, lines = part.partition("\n")
        found.append((shlex.split(command), lines.splitlines()))
    return found


@pytest.mark.parametrize("number", range(3))
def test_the_first_run_prints_what_the_page_says(number, first_run):
    words, lines = blocks()[number]
    result = first_run(number)
    shown = [re.sub(r"\d+\.\d s$", "# s", line) for line in lines]
    told = [line for line in result.out.splitlines() if not line.endswith(" left")]  # of a slow run
    printed = [re.sub(r"\d+\.\d s$", "# s", line) for line in told]
    assert (result.code, printed) == (0, shown), words


def test_the_map_of_the_page_shows_the_errors_that_it_names(first_run, folder, monkeypatch):
    first_run(2)
    monkeypatch.chdir(folder)
    (block,) = re.findall(r"```py\n(.*?)```", PAGE, re.DOTALL)
    names = {}
    exec(compile(block, "block", "exec"), names)
    remarks = [axis.get_title(loc="right") for axis in names["figure"].axes]
    errors = [remark.split()[1] for remark in remarks if remark.startswith("rms")]
    assert "falls from {} to {} m² s⁻²".format(*errors[1:]) in " ".join(PAGE.split())
    assert (folder / "analysis.png").stat().st_size > 1000


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """An empty folder, but for the forecast model of the page."""
    made = tmp_path_factory.mktemp("first")
    (model,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    (made / "my_model.py").write_text(model)
    return made


@pytest.fixture(scope="module")
def first_run(gates_in, folder):
    """Results of the commands of the page in an empty folder, by number; each runs once."""
    run, results = gates_in(folder), {}

    def result(number):
        for earlier in range(number + 1):
            if earlier not in results:
                results[earlier] = run(*blocks()[earlier][0])
        return results[number]

    return result
