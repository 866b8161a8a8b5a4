"""Names of a package that are imported when they are first used."""

import ast
import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any


def exports(
    package: str, file: str
) -> tuple[Callable[[str], Any], Callable[[], list[str]], list[str]]:
    """Return ``__getattr__``, ``__dir__`` and ``__all__`` of a package that has a stub.

    The stub ``__init__.pyi`` next to ``file`` is the only list of names: type checkers read it, and
    here each ``from .room import that as name`` tells where a name lives. ``__version__`` is
    that of the installed distribution.

    Args:
        package: ``__name__`` of the package.
        file: ``__file__`` of the package.
    """
    stub = ast.parse(Path(file).with_suffix(".pyi").read_text(encoding="utf-8"))
    imports = [node for node in stub.body if isinstance(node, ast.ImportFrom)]
    homes = {
        alias.asname or alias.name: ("." * node.level + str(node.module), alias.name)
        for node in imports
        for alias in node.names
    }

    def get(name: str) -> Any:
        if name == "__version__":
            return importlib.import_module("importlib.metadata").version("gatesuite")
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        module, attribute = homes[name]
        return getattr(importlib.import_module(module, package), attribute)

    return get, lambda: sorted(homes), sorted(homes)
