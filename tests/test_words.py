"""The words of docs, docstrings, comments and messages: none that CONTRIBUTING.md calls wrong."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = (
    "apps", "benchmarks", "core_gates", "diffusion", "endoscopy", "harness", "language", "recsys",
    "studies", "video_multitask", "weather",
)  # fmt: skip
FOLDERS = (*PACKAGES, "docs", "tests", ".ci")
SUFFIXES = {".md", ".py", ".pyi", ".yaml", ".cpp", ".css"}
LOOSE = ("CHANGELOG.md", "CONTRIBUTING.md", "Makefile", "README.md", "mkdocs.yml", "pyproject.toml")
ROW = re.compile(r"^\| (`.+?) \| (.+?) \|.*\|$", re.MULTILINE)
STRING_OR_COMMENT = re.compile(
    r'''("""|\'\'\').*?(?<!\\)(?:\\\\)*\1|"(?:\\.|[^"\\\n])*"|'(?:\\.|[^'\\\n])*'|#[^\n]*''',
    re.DOTALL,
)
CODE = re.compile(r"^```.*?^```$|``.*?``|`[^`]*`", re.MULTILINE | re.DOTALL)


def wrong_words() -> dict[str, str]:
    """The first two columns of the table of words: each pattern, and what to write instead."""
    table = (ROOT / "CONTRIBUTING.md").read_text().partition("\n## Words\n")[2]
    rows = [(cell.replace("\\|", "|"), right) for cell, right in ROW.findall(table)]
    return {pattern: right for cell, right in rows for pattern in re.findall(r"`(.+?)`", cell)}


WRONG = wrong_words()


def spaced(pattern: str) -> str:
    return pattern.replace("[- ]", r"[-\s]").replace(" ", r"\s+")


SEARCHED = {
    pattern: re.compile(rf"(?<![\w-])(?:{spaced(pattern)})(?![\w-])", re.IGNORECASE)
    for pattern in WRONG
}
LIKELY = {pattern: re.compile(spaced(pattern)) for pattern in WRONG}  # fast, in small letters


def of_python(source: str) -> list[tuple[int, str]]:
    """The comments, docstrings and messages of a module, each with its first line."""
    comments: list[tuple[int, str]] = []
    for found in STRING_OR_COMMENT.finditer(source):
        if found[0].startswith("#"):
            line, text = source.count("\n", 0, found.start()) + 1, found[0][1:]
            if comments and sum((comments[-1][0], comments[-1][1].count("\n"), 1)) == line:
                line, text = comments[-1][0], f"{comments.pop()[1]}\n{text}"
            comments.append((line, text))
    strings = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.JoinedStr):
            parts = [one.value if isinstance(one, ast.Constant) else "0" for one in node.values]
            strings.append((node.lineno, "".join(map(str, parts))))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            strings.append((node.lineno, node.value))
    return comments + [(line, text) for line, text in strings if len(text.split()) > 1]


def of_settings(source: str) -> list[tuple[int, str]]:
    """The comments of a YAML, TOML, C++, CSS or make file, and its quoted sentences."""
    pattern = re.compile(r"""(?:#|//) .*|/\*.*?\*/|"[^"]* [^"]*"|description:.*""")
    lines = enumerate(source.splitlines(), 1)
    return [(number, part) for number, line in lines for part in pattern.findall(line)]


def prose(path: Path) -> list[tuple[int, str]]:
    """What a file tells its readers, without the code between backticks and in fences."""
    source = path.read_text()
    if path.suffix in (".py", ".pyi"):
        pieces = of_python(source)
    else:
        pieces = [(1, source)] if path.suffix == ".md" else of_settings(source)
    return [
        (line, CODE.sub(lambda code: "x" + "\n" * code[0].count("\n"), t)) for line, t in pieces
    ]


def faults(path: Path) -> list[str]:
    """Each wrong word of a file, with its line and the right one."""
    found, pieces = {}, prose(path)
    whole = "\0".join(text for _, text in pieces).lower()
    likely = [pattern for pattern, regex in LIKELY.items() if regex.search(whole)]
    for start, text in pieces:
        for pattern in likely:
            for match in SEARCHED[pattern].finditer(text):
                line = start + text[: match.start()].count("\n")
                words = " ".join(match[0].split())
                found[line, words] = f"{path}:{line}: not {words!r} but {WRONG[pattern]}"
    return [found[key] for key in sorted(found)]


def places() -> list[Path]:
    files = [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*"))]
    files = [path for path in files if path.suffix in SUFFIXES]
    return [*files, *(ROOT / name for name in LOOSE)]


def read() -> list[Path]:
    quoting = (Path(__file__), ROOT / "CONTRIBUTING.md")  # wrong words
    return [path for path in places() if path not in quoting]


def test_the_table_has_its_words():
    assert len(WRONG) >= 40
    assert all(WRONG.values())
    assert {"beside", "anew", "nobody", "(go|goes|going|went) on"} <= set(WRONG)


@pytest.mark.costly("reads every file of the tree")
def test_no_wrong_words():
    wrong = [fault for path in read() for fault in faults(path)]
    assert not wrong, "\n" + "\n".join(wrong)


def test_names_say_what_things_are():
    """No module, class or function has a name that hides what it is."""
    wrong = "Room|Seen|Shown|Suits|tell|told"
    defined = re.compile(rf"^\s*(?:class|(?:async )?def) (?:{wrong})\b", re.MULTILINE)
    files = [path for package in PACKAGES for path in (ROOT / package).rglob("*.py*")]
    files = [path for path in files if path.suffix in (".py", ".pyi")]
    assert len(files) > 600
    faults = [f"{path}: {name}" for path in files for name in defined.findall(path.read_text())]
    faults += [str(path) for path in files if re.fullmatch(wrong, path.stem)]
    assert not faults, "\n".join(faults)


def test_no_wrong_words_around_the_table_of_them(tmp_path):
    page = (ROOT / "CONTRIBUTING.md").read_text()
    rest = tmp_path / "rest.md"
    rest.write_text(page.partition("\n## Words\n")[0])
    assert "## Tests" in rest.read_text()
    assert faults(rest) == []


def test_the_whole_tree_is_read():
    names = {path.relative_to(ROOT).as_posix() for path in read()}
    rooms = {name.partition("/")[0] for name in names}
    assert {*FOLDERS} - {".ci"} <= rooms
    assert {
        "README.md",
        "docs/reference/gates.md",
        "core_gates/moe/layer.py",
        "pyproject.toml",
    } <= names


@pytest.mark.parametrize(
    ("name", "source", "lines"),
    [
        ("a.py", '"""Put it\n    beside it."""\n', [2]),
        ("a.py", "x = 1  # made anew\n", [1]),
        ("a.py", 'raise ValueError(f"{x} is"\n f" beside {y}")\n', [1]),
        ("a.py", 'beside = {"beside": anew}\n"""Return ``beside``."""\n', []),
        ("a.py", "# one line\n# that goes\n# on, a share\n# of it\n", [2, 3]),
        ("a.py", '"""There is no row; it is no larger, and besides."""\n', []),
        ("a.md", "# Title\n\nA `beside` file\nmade\nAnew.\n```\nbeside\n```\nbeside\n", [5, 9]),
        ("a.toml", 'x = "1"  # beside it\nbeside = 1\n', [1]),
    ],
)
def test_what_is_searched(name, source, lines, tmp_path):
    (tmp_path / name).write_text(source)
    assert [int(fault.split(":")[1]) for fault in faults(tmp_path / name)] == lines
