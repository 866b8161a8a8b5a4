"""Documentation that runs: every Python block is executed, every command and link exists."""

import contextlib
import functools
import importlib
import io
import re
import shlex
from pathlib import Path

import pytest
import yaml

import core_gates
from apps.main import APPS, PACKAGES, main
from core_gates import Gate

ROOT = Path(__file__).parents[1]
ROOMS = [f"core_gates.{room}" for room in ("adapters", "attention", "features", "gates")]
DOCS = ROOT / "docs"
GENERATED = "api", "commands"  # folders of the reference that `make docs` writes
PAGES = [
    ROOT / "README.md",
    *(page for page in sorted(DOCS.rglob("*.md")) if page.parent.name not in GENERATED),
]
FOLDERS = (
    "apps|benchmarks|core_gates|diffusion|docs|endoscopy|harness|language|recsys|studies|tests|"
    "video_multitask|weather"
)
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(page: Path, language: str) -> list[str]:
    return [body for name, body in FENCE.findall(page.read_text()) if name == language]


def name_of(page: Path) -> str:
    """``guide/weather`` of a page in ``docs``, else its name."""
    return page.relative_to(DOCS).as_posix() if page.is_relative_to(DOCS) else page.name


WITH_PYTHON = [page for page in PAGES if blocks(page, "python")]


def own_apps(page: Path) -> list[str]:
    """Applications that a page itself adds to the table."""
    return re.findall(r'^ *"(\w+)": App\(', page.read_text(), re.MULTILINE)


def commands(page: Path) -> list[list[str]]:
    """Every ``gates ...`` of a page, in fenced blocks and between backticks.

    An application that the page itself adds to the table is left to a test that it adds.
    """
    text, own = page.read_text(), own_apps(page)
    bodies = [body.replace("\\\n", " ") for _, body in FENCE.findall(text)]
    lines = [line.removeprefix("$ ") for body in bodies for line in body.splitlines()]
    lines += re.findall(r"`(gates [^`]*)`", FENCE.sub("", text))
    lines = [line for line in lines if "gates " in line and " error: " not in line]
    words = [shlex.split(line.strip(), comments=True) for line in lines]
    return [found[1:] for found in words if found[:1] == ["gates"] and found[1] not in own]


COSTLY = {
    "guide/core_gates.md": "compiles and exports a layer",
    "guide/recsys.md": "trains, exports and serves a model",
}


@pytest.mark.parametrize(
    "page",
    [
        pytest.param(page, marks=pytest.mark.costly(reason), id=name_of(page))
        if (reason := COSTLY.get(name_of(page)))
        else pytest.param(page, id=name_of(page))
        for page in WITH_PYTHON
    ],
)
def test_python_blocks_run(page, forked, tmp_path, monkeypatch):
    """The blocks of a page are one script, run in an empty folder with warnings as errors."""
    monkeypatch.chdir(tmp_path)
    strict = "import warnings\nwarnings.simplefilter('error', UserWarning)\n"
    (tmp_path / "page.py").write_text(strict + "\n".join(blocks(page, "python")))
    forked.finished(["page.py"], {"MPLBACKEND": "Agg"}, timeout=300)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_commands_exist(page):
    for words in commands(page):
        name = words[0]
        if name.startswith("-") or name == "APP":
            continue
        assert name in APPS, f"gates {name}"
        if APPS[name].verbs and not words[1].startswith("-") and words[1] != "VERB":
            assert words[1] in APPS[name].verbs, f"gates {name} {words[1]}"
        if "--config" in words:
            config = words[words.index("--config") + 1]
            if config.isidentifier():
                assert (ROOT / "apps" / name / "configs" / f"{config}.yaml").is_file(), config


@functools.cache
def help_of(*words: str) -> str:
    out = io.StringIO()
    with contextlib.redirect_stdout(out), pytest.raises(SystemExit) as stop:
        main([*words, "--help"])
    assert not stop.value.code
    return out.getvalue()


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_options_exist(page):
    for words in commands(page):
        options = [word.partition("=")[0] for word in words if word.startswith("--")]
        if words[0] not in APPS or not options:
            continue
        deep = 2 if words[1:2] == ["offload"] else 1  # verbs of a verb
        verb = words[1 : 1 + deep] if APPS[words[0]].verbs else []
        if verb in (["VERB"], options[:1]):
            continue
        study = words[2:4] if words[1:4:2] == ["evaluate", "sora"] else []  # options of a study
        known = re.findall(r"--[\w.]+", help_of(words[0], *verb, *study))
        for option in options:
            if f"unrecognized arguments: {option}" in page.read_text():
                continue  # the page shows what becomes of a slip
            assert option in known, f"gates {' '.join([words[0], *verb])} {option}"


def test_the_commands_of_the_readme_are_found():
    found = commands(ROOT / "README.md")
    assert ["doctor"] in found
    assert ["weather", "fit", "--config", "tiny"] in found


def anchors(page: Path) -> set[str]:
    """The anchors of the headings of a page."""
    titles = re.findall(r"^#+ (.+)$", FENCE.sub("", page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CONTRIBUTING.md"], ids=name_of)
def test_links_and_files_exist(page):
    text = FENCE.sub("", page.read_text())
    for target in re.findall(r"\]\(([^):]+)\)", text):
        name, _, anchor = target.partition("#")
        linked = page.parent / name if name else page
        assert linked.exists(), target
        if anchor and linked.suffix == ".md":
            assert anchor in anchors(linked), target
    for path in re.findall(rf"`((?:{FOLDERS})/[\w/.-]*)`", text):
        if path.split("/")[1] not in own_apps(page):
            assert (ROOT / path).exists(), path


def test_the_readme_links_each_system_to_its_page():
    systems = (ROOT / "README.md").read_text().partition("## Systems")[2]
    table = re.findall(r"^\| (.+?) \| (.+?) \|", systems, re.MULTILINE)[1:]
    assert len(table) == 18
    for system, files in table:
        assert "](docs/" in system, system
        paths = re.findall(r"`(.+?)`", files)
        assert paths
        assert all((ROOT / path).exists() for path in paths), files


def pages_of(entries: list[dict]) -> list[str]:
    """The pages of entries of the navigation, whose values are pages or entries."""
    values = [value for entry in entries for value in entry.values()]
    return [p for v in values for p in (pages_of(v) if isinstance(v, list) else [v])]


def test_every_page_is_in_the_navigation():
    navigation = yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]
    assert [*map(list, navigation[1:])] == [["Guide"], ["Evidence"], ["Reference"], ["Develop"]]
    listed = pages_of(navigation)
    written = [page for page in listed if Path(page).parent.name not in GENERATED]
    assert sorted(written) == sorted(name_of(page) for page in PAGES[1:])
    pages = {f"reference/api/{name}.md" for name in PACKAGES if name != "benchmarks"}
    pages |= {f"reference/commands/{name}.md" for name, app in APPS.items() if app.verbs}
    assert set(listed) - set(written) == pages
    sources = [file for name in PACKAGES for file in (ROOT / name).rglob("*.py")]
    role = re.compile(r":[a-z]+:`[^`]")  # of Sphinx, which the pages of the API would show as it is
    assert [str(file) for file in sources if role.search(file.read_text())] == []


def test_the_page_of_gates_names_every_gate():
    page = (ROOT / "docs" / "reference" / "gates.md").read_text()
    rooms = [core_gates, *map(importlib.import_module, ROOMS)]
    exported = {name: getattr(room, name) for room in rooms for name in room.__all__}
    gates = {
        name
        for name, kind in exported.items()
        if isinstance(kind, type) and (issubclass(kind, Gate) or hasattr(kind, "gate_values"))
    }
    assert {"CometGate", "LoraGate"} < gates
    assert {name for name in gates - {"Gate"} if f"`{name}`" not in page} == set()


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 110
    assert (DOCS / "images" / "results.png").stat().st_size <= 300_000


def words(page: Path) -> int:
    """The words of a page, code included; bars of tables are none."""
    return sum(bool(re.search(r"\w", word)) for word in page.read_text().split())


def test_pages_are_short():
    assert sum(map(words, PAGES)) <= 38_000
    limits = {"guide": 1_000, "evidence": 2_000}
    long = [name_of(p) for p in PAGES if words(p) > limits.get(p.parent.name, 38_000)]
    assert long == []
