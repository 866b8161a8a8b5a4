"""Write the pages of the reference that are generated: `python docs/generate.py`.

``reference/api`` names what is public, a page a package, which mkdocstrings fills from the
docstrings; ``reference/commands`` holds the help of every verb and the packaged configurations.
"""

import contextlib
import inspect
import io
import re
from importlib import import_module
from pathlib import Path

from apps.main import APPS, main

REFERENCE = Path(__file__).parent / "reference"
APPLICATIONS = Path(import_module("apps").__file__).parent
CORE = "adapters", "attention", "features", "gates", "moe", "ops", "routing", "training"
HARNESS = "command", "evidence", "experiment", "figures", "files"
PACKAGES = {
    "core_gates": ("core_gates", *(f"core_gates.{name}" for name in CORE)),
    "harness": tuple(f"harness.{name}" for name in HARNESS),
    "apps": ("apps.main",),
    **{
        name: (name,)
        for name in (
            "weather", "endoscopy", "recsys", "video_multitask", "diffusion", "language", "studies"
        )
    },
}  # fmt: skip


def public(module: str) -> list[str]:
    """Return the public names of a module, all but its constants if it lists none."""
    loaded = import_module(module)
    if hasattr(loaded, "__all__"):
        return list(loaded.__all__)
    return [
        name
        for name, value in vars(loaded).items()
        if getattr(value, "__module__", "") == module and name[0] != "_"
    ]


def imported_by_pages() -> dict[str, set[str]]:
    """Return module -> names that guides and examples import of it."""
    folder = Path(__file__).parent
    files = [*folder.glob("guide/*.md"), *folder.parent.glob("examples/*.py")]
    text = "\n".join(file.read_text() for file in files)
    names: dict[str, set[str]] = {}
    for module, listed in re.findall(
        r"^from (\w+(?:\.\w+)+) import ([\w, ]+)$", text, re.MULTILINE
    ):
        if module.partition(".")[0] in PACKAGES:
            names.setdefault(module, set()).update(listed.split(", "))
    return names


def is_module(module: str, name: str) -> bool:
    """Return whether a name is that of a module."""
    return inspect.ismodule(getattr(import_module(module), name))


def place_of(module: str, name: str) -> str:
    """Return where a name is documented: a function may be called like its module."""
    value = getattr(import_module(module), name)
    return f"{value.__module__}.{name}" if inspect.isfunction(value) else f"{module}.{name}"


def api_page(modules: tuple[str, ...]) -> str:
    """Return a page with every public name of some modules, and what pages import, each once."""
    package, seen = modules[0].partition(".")[0], set[str]()
    parts, others = [f"# {package}"], imported_by_pages()
    below = sorted(module for module in others if module.partition(".")[0] == package)
    for module in (*modules, *below):
        names = public(module) if module in modules else others[module]
        names = [name for name in names if name not in seen and not is_module(module, name)]
        seen |= set(names)
        if names:
            summary = (import_module(module).__doc__ or "").partition("\n")[0]
            parts += [
                f"## `{module}`",
                summary,
                *(f"::: {place_of(module, name)}" for name in sorted(names)),
            ]
    return "\n\n".join(parts) + "\n"


def help_of(*words: str) -> str:
    """Return the text that ``gates WORDS --help`` prints."""
    text = io.StringIO()
    with contextlib.redirect_stdout(text), contextlib.suppress(SystemExit):
        main([*words, "--help"])
    return text.getvalue().rstrip()


def commands_page(name: str) -> str:
    """Return a page with the help of every verb of an application, and its configurations."""
    app = APPS[name]
    parts = [f"# gates {name}", app.summary[0].upper() + app.summary[1:] + "."]
    for verb in app.verbs:
        parts += [f"## {verb}", f"```text\n{help_of(name, verb)}\n```"]
    files = sorted((APPLICATIONS / name / "configs").glob("*.yaml"))
    if files:
        lines = [
            f"| `{file.stem}` | {file.read_text().partition(chr(10))[0].lstrip('# ')} |"
            for file in files
        ]
        parts += [
            "## Configurations",
            "\n".join(["| `--config` | what it is |", "|---|---|", *lines]),
        ]
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    pages = {f"api/{name}": api_page(modules) for name, modules in PACKAGES.items()}
    pages |= {f"commands/{name}": commands_page(name) for name, app in APPS.items() if app.verbs}
    for name, text in pages.items():
        page = (REFERENCE / name).with_suffix(".md")
        page.parent.mkdir(parents=True, exist_ok=True)
        page.write_text(text)
