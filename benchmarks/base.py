"""Another revision of the library next to this one, in the same process."""

import importlib
import importlib.util
import re
import subprocess
import sys
import tarfile
from io import BytesIO
from pathlib import Path
from types import ModuleType

from core_gates.errors import GatesError

PACKAGES = ("core_gates", "endoscopy", "weather")


def load_head(name: str) -> ModuleType:
    """Import a module of this tree."""
    return importlib.import_module(name)


class BaseTree:
    """The packages of another revision under separate names, ``core_gates_base`` and so on.

    Imports and the names of registered operators are rewritten, so that both revisions live in one
    process and can be timed alternately.

    Args:
        revision: Any revision that git knows.
        folder: Empty folder for the sources.
        repository: A folder of the repository.

    Raises:
        GatesError: Git does not know the revision.
    """

    def __init__(self, revision: str, folder: Path, repository: Path) -> None:
        root = ["git", "-C", str(repository)]
        known = _git([*root, "ls-tree", "--name-only", "--full-tree", revision], revision)
        self.packages = [p for p in PACKAGES if p in known.decode().split()]
        top = _git([*root, "rev-parse", "--show-toplevel"], revision).decode().strip()
        archive = _git(["git", "-C", top, "archive", revision, "--", *self.packages], revision)
        with tarfile.open(fileobj=BytesIO(archive)) as tar:
            tar.extractall(folder, filter="data")
        for package in self.packages:
            target = folder / f"{package}_base"
            (folder / package).rename(target)
            for path in target.rglob("*.py"):
                path.write_text(self._rewrite(path.read_text(encoding="utf-8")), encoding="utf-8")
        for package in self.packages:
            _install(f"{package}_base", folder / f"{package}_base")

    def __call__(self, name: str) -> ModuleType:
        """Import a module of the other revision by its usual name."""
        package, dot, rest = name.partition(".")
        return importlib.import_module(f"{package}_base{dot}{rest}")

    def _rewrite(self, source: str) -> str:
        names = "|".join(self.packages)
        source = re.sub(rf"(?m)^(\s*(?:from|import)\s+)({names})\b", r"\1\2_base", source)
        source = re.sub(rf"([\"'])({names})(::|\.)", r"\1\2_base\3", source)
        return re.sub(rf"\btorch\.ops\.({names})\b", r"torch.ops.\1_base", source)


def _install(name: str, folder: Path) -> None:
    spec = importlib.util.spec_from_file_location(
        name, folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    if spec is None or spec.loader is None:
        raise GatesError(f"{folder} holds no package")
    for loaded in [key for key in sys.modules if key == name or key.startswith(f"{name}.")]:
        del sys.modules[loaded]
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)


def _git(command: list[str], revision: str) -> bytes:
    done = subprocess.run(command, capture_output=True, check=False)
    if done.returncode != 0:
        reason = done.stderr.decode(errors="replace").strip().splitlines()
        raise GatesError(f"--base {revision!r} cannot be read: {reason[0] if reason else 'git'}")
    return done.stdout
