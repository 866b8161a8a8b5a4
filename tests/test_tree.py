"""The tree: short files and functions, rooms where a folder grows, names that say one thing."""

import ast
import json
import re
from collections import Counter
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest

from harness.files.piece import Piece, read_record

ROOT = Path(__file__).parents[1]
PACKAGES = (
    "apps", "benchmarks", "core_gates", "diffusion", "endoscopy", "harness", "language", "recsys",
    "studies", "video_multitask", "weather",
)  # fmt: skip
MODULES, LINES, FUNCTION_LINES, COSTLY = 16, 500, 60, 60
LARGE = {"core_gates/gates"}  # one gate per file: the list of gates is what `ls` shows
NAMELESS = {"utils", "helpers", "common", "misc"}
REPEATED = {
    *("__init__", "op", "kernel", "reference", "commands", "report", "tour"),
    "source",  # of three experiments of weather, whose configurations name the class by its path
}
"""Names that more than two files may have."""
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
DOTTED = re.compile(r"(?:\w+[.:])+\w+")
GENERATED = "api", "commands"  # folders of pages that `make docs` writes
WORDS = re.compile(r"[A-Za-z_]\w*")
KEPT = {
    "tiny_vit": "a benchmark takes it by its plain name",
}
"""Definitions that only tests use, with the reason why they stay."""


class Module(NamedTuple):
    """What the checks read of a file, which is parsed once.

    Attributes:
        long: Functions that are too long, docstrings included.
        statements: Names that each statement defines, and all names that it contains.
        references: ``module.name`` of imports, of attributes of imported modules, and of strings.
        count: Number of statements, docstrings left out.
    """

    long: list
    statements: list
    references: set
    count: int


def sources(package):
    files = sorted((ROOT / package).rglob("*.py"))
    assert files
    return files


def name_of(path):
    return path.relative_to(ROOT).as_posix()


def read(source, is_package=False):
    """The facts of a file. What a package imports is a reference only where its code uses it."""
    long, statements, imports, attributes, references = [], [], {}, [], set()
    tree = ast.parse(source)
    count = -(ast.get_docstring(tree, clean=False) is not None)
    for statement in tree.body:
        names = set()
        for node in ast.walk(statement):
            count += isinstance(node, ast.stmt)
            if isinstance(node, (ast.ClassDef, *FUNCTIONS)):
                count -= ast.get_docstring(node, clean=False) is not None
            if isinstance(node, ast.Name):
                names.add(node.id)
            elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                attributes.append((node.value.id, node.attr))
            elif isinstance(node, ast.Attribute) and loads_module(node.value):
                references.add(f"*.{node.attr}")
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                if DOTTED.fullmatch(node.value):
                    references.add(node.value.replace(":", "."))
            elif isinstance(node, ast.ImportFrom):
                imports |= {a.asname or a.name: f"{node.module}.{a.name}" for a in node.names}
            elif isinstance(node, FUNCTIONS) and node.end_lineno - node.lineno >= FUNCTION_LINES:
                long.append(node.name)
        statements.append((defined(statement), names))
    used = set().union(*(names for _, names in statements))
    references |= {f"{imports[name]}.{attr}" for name, attr in attributes if name in imports}
    references |= {imports[name] for name in imports if name in used or not is_package}
    return Module(long, statements, references, count)


@cache
def module(path):
    return read(path.read_text(), path.name == "__init__.py")


def loads_module(node):
    """Whether an expression is ``import_module(...)``, or ``load(...)`` of a benchmark."""
    function = getattr(node, "func", None)
    return getattr(function, "attr", getattr(function, "id", "")) in {"import_module", "load"}


def defined(statement):
    """The names that a statement of a file defines, those like ``__all__`` aside."""
    if isinstance(statement, (*FUNCTIONS, ast.ClassDef)):
        return {statement.name}
    if not isinstance(statement, (ast.Assign, ast.AnnAssign)):
        return set()
    targets = getattr(statement, "targets", [getattr(statement, "target", None)])
    nodes = [node for target in targets for node in ast.walk(target)]
    names = {node.id for node in nodes if isinstance(node, ast.Name)}
    return {name for name in names if not name.startswith("__")}


def dead(modules, words):
    """Yield ``module.name`` of what no other statement of its file, no file and no text names.

    Args:
        modules: Dotted name of each file to its facts.
        words: Of pages and configurations.
    """
    references = set().union(*(facts.references for facts in modules.values()))
    relative = {".".join(reference.split(".")[-2:]) for reference in references}
    for path, facts in modules.items():
        count = Counter(name for _, names in facts.statements for name in names)
        parts = path.split(".")
        places = ["*", *(".".join(parts[: end + 1]) for end in range(len(parts)))]
        for names, contained in facts.statements:
            named = any(
                count[name] > (name in contained)
                or name in words
                or f"{parts[-1]}.{name}" in relative
                or any(f"{place}.{name}" in references for place in places)
                for name in names
            )
            if not named:
                yield from (f"{path}.{name}" for name in names)


def words_of_pages():
    """Names in the code of pages, and all words of configurations."""
    written = [page for page in ROOT.glob("docs/**/*.md") if page.parent.name not in GENERATED]
    pages = "".join(page.read_text() for page in [ROOT / "README.md", *written])
    texts = re.findall(r"```.*?```|`[^`]+`", pages, re.DOTALL)
    files = [ROOT / "pyproject.toml", ROOT / "mkdocs.yml"]
    files += [file for package in PACKAGES for file in (ROOT / package).rglob("*.yaml")]
    return set(WORDS.findall("\n".join([*texts, *(file.read_text() for file in files)])))


@pytest.mark.parametrize("package", PACKAGES)
@pytest.mark.fault("core S7")
def test_a_folder_that_grows_gets_rooms(package):
    folders = {file.parent for file in sources(package)}
    crowded = {
        name_of(folder)
        for folder in folders
        if len([m for m in folder.glob("*.py") if m.name != "__init__.py"]) > MODULES
    }
    assert crowded - LARGE == set()


@pytest.mark.parametrize("package", PACKAGES)
def test_no_file_is_named_like_its_folder_or_like_nothing(package):
    assert [name_of(f) for f in sources(package) if f.stem in {f.parent.name, *NAMELESS}] == []


def test_a_name_says_one_thing():
    stems = Counter(f.stem for package in PACKAGES for f in sources(package))
    assert {stem for stem, files in stems.items() if files > 2} - REPEATED == set()


def test_few_tests_are_costly():
    marks = re.findall(
        r"mark\.costly\(\s*(.)", "".join(f.read_text() for f in (ROOT / "tests").rglob("test_*.py"))
    )
    assert 0 < len(marks) <= COSTLY
    assert set(marks) <= {'"', "r"}, "a reason is missing"  # in words, or called reason


@pytest.mark.parametrize("package", PACKAGES)
def test_files_are_short(package):
    long = [name_of(f) for f in sources(package) if len(f.read_text().splitlines()) > LINES]
    assert long == []


@pytest.mark.parametrize("package", PACKAGES)
def test_functions_are_short(package):
    long = {
        f"{name_of(file)}: {function}"
        for file in sources(package)
        for function in module(file).long
    }
    assert long == set()


def test_a_long_function_is_found():
    assert read("def f():\n" + "    x = 1\n" * FUNCTION_LINES).long == ["f"]


def test_nothing_is_there_for_tests_alone():
    modules = {
        name_of(file).removesuffix(".py").removesuffix("/__init__").replace("/", "."): module(file)
        for package in PACKAGES
        if package != "core_gates"
        for file in sources(package)
    }
    found = set(dead(modules, words_of_pages()))
    assert {name.rpartition(".")[2] for name in found} == set(KEPT)


def test_what_only_a_package_passes_on_is_dead():
    room = "from a.b import f, g, run\n__all__ = ['f', 'g', 'run']\nrun()"
    code = "X = 1\ndef f(): return f\ndef g(): return X\ndef run(): pass\ndef of_text(): pass"
    modules = {"a": read(room, is_package=True), "a.b": read(code)}
    assert set(dead(modules, {"of_text"})) == {"a.b.f", "a.b.g"}
    users = [
        "from a import f",
        "from a import b\nb.f()",
        "x = 'a.b:f'",
        "x = {'f': 'b:f'}",
        "load('a.b').f",
    ]
    for user in users:
        assert set(dead({**modules, "c": read(user)}, {"of_text", "x"})) == {"a.b.g"}


def test_the_harness_knows_no_domain():
    words = re.compile(r"weather|endoscop|polyp|forecast|assimilat|recsys|lora\b", re.IGNORECASE)
    assert [name_of(f) for f in sources("harness") if words.search(f.read_text())] == []


@pytest.mark.parametrize("app", ["weather", "endoscopy", "video", "diffusion", "language"])
def test_applications_leave_engines_to_the_harness(app):
    engines = re.compile(r"L\.Trainer\(|ProcessPool|(from|import) safetensors|importlib\.resources")
    found = [name_of(f) for f in sources(f"apps/{app}") if engines.search(f.read_text())]
    assert found == []


@pytest.mark.fault("46 H6")
def test_applications_define_no_networks_and_train_none_by_themselves():
    engines = re.compile(r"\(nn\.Module\)|\(L\.LightningModule\)|\.backward\(|torch\.optim\b")
    assert [name_of(f) for f in sources("apps") if engines.search(f.read_text())] == []


@pytest.mark.fault("46 H6")
@pytest.mark.parametrize("package", PACKAGES)
def test_names_have_one_spelling_of_analyze(package):
    other = re.compile(r"analys(e[dr]?|ing)(?![a-z])", re.IGNORECASE)
    assert [name_of(f) for f in sources(package) if other.search(f.read_text())] == []


@pytest.mark.fault("46 H6")
def test_every_requirement_has_its_reason():
    lines = (ROOT / "pyproject.toml").read_text().splitlines()
    bounds = [line for line in lines if re.match(r'\s+"[\w.\[\]-]+[<>=]=', line)]
    assert len(bounds) > 40
    tools = "hypothesis import-linter mypy pandas-stubs pytest pytest-cov ruff types-PyYAML"
    names = {re.match(r'\s+"([\w.-]+)', line)[1] for line in bounds if "#" not in line}
    assert names <= {*tools.split()}


@pytest.mark.fault("46 H6")
def test_checkpoints_are_read_without_pickle():
    loads = re.compile(r"torch\.load\((?:[^()]|\([^()]*\))*\)")
    found = [
        call
        for package in PACKAGES
        for f in sources(package)
        for call in loads.findall(f.read_text())
    ]
    assert len(found) >= 2
    assert [call for call in found if "weights_only=True" not in call] == []


def test_shipped_records_name_no_folder_of_a_machine():
    records = [path for package in PACKAGES for path in (ROOT / package).rglob("record.json")]
    assert len(records) > 100
    commands = {json.loads(path.read_text()).get("command", "") for path in records}
    assert [command for command in commands if "--root" in command or " /" in command] == []


def test_shipped_records_are_those_of_their_pieces():
    for path in [p for package in PACKAGES for p in (ROOT / package).rglob("record.json")]:
        record = read_record(path.parent)
        assert Piece(**record.identity, settings=record.settings).fingerprint == record.fingerprint


def test_what_records_and_configurations_name_is_there():
    named = re.compile(rf"\b(?:{'|'.join(PACKAGES)})(?:\.(?!safetensors\b)\w+)+")
    kinds = ("record.json", "*.yaml")
    files = [f for package in PACKAGES for kind in kinds for f in (ROOT / package).rglob(kind)]
    names = {name for file in files for name in named.findall(file.read_text())}
    assert len(names) > 20
    assert [name for name in sorted(names) if not exists(*name.rpartition(".")[::2])] == []


def exists(place, name):
    """Whether a module or a package has a name, in its stub if it has one."""
    path = ROOT / place.replace(".", "/")
    files = path.glob("__init__.py*") if path.is_dir() else [path.with_suffix(".py")]
    return any(re.search(rf"\b{name}\b", f.read_text()) for f in files if f.is_file())
