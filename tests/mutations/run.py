"""Plant faults one by one in a copy of the tree and show which of them the daily tests catch.

``python -m tests.mutations.run [ROOM ...]``; it succeeds if at most one fault in twenty is missed.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from tests.mutations.faults import FAULTS, Fault

ROOT = Path(__file__).parents[2]
MISSED = 0.05  # fraction of faults that may be missed
PASSED, FAILED, STOPPED = 0, 1, 2  # exit codes of pytest: the last where a file cannot be imported


def planted(root: Path, fault: Fault) -> str:
    """Return the text of a file with a fault.

    Raises:
        SystemExit: The original text is not in the file, or more than once.
    """
    path = root / fault.file
    text = path.read_text() if path.is_file() else ""
    if (count := text.count(fault.original)) != 1:
        raise SystemExit(
            f"{fault.file} has {fault.original!r} {count} times, expected once: bring the fault in "
            "tests/mutations/faults.py up to date"
        )
    return text.replace(fault.original, fault.replacement)


def copied(place: Path) -> Path:
    """Commit what git tracks or would track to a new repository, next to the shared data."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    listed = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    for name in filter(None, listed.stdout.split("\0")):
        if (ROOT / name).is_file():
            (place / "tree" / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, place / "tree" / name)
    if (shared := ROOT.parent / "shared").is_dir():
        (place / "shared").symlink_to(shared)
    git = ["git", "-c", "user.name=faults", "-c", "user.email=faults@localhost"]
    for words in (["init", "-q"], ["add", "--all"], ["commit", "-q", "-m", "without a fault"]):
        subprocess.run([*git, *words], cwd=place / "tree", check=True)  # results name a revision
    return place / "tree"


def outcome(tree: Path, tests: str) -> int:
    """Run daily tests until one fails, and return the exit code of pytest.

    Raises:
        SystemExit: Pytest found no test, or did not run.
    """
    words = [f"tests/{name}" for name in tests.split()]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *words],
        cwd=tree,
        env=os.environ | {"PYTHONPATH": str(tree)},
        capture_output=True,
        text=True,
    )
    if done.returncode not in (PASSED, FAILED, STOPPED):
        raise SystemExit(f"pytest {' '.join(words)} ends with {done.returncode}: {done.stdout}")
    return done.returncode


def main(rooms: Sequence[str]) -> None:
    """Plant the faults of some rooms, by default of all."""
    faults = [fault for fault in FAULTS if not rooms or fault.room in rooms]
    texts = [planted(ROOT, fault) for fault in faults]
    missed = 0
    with tempfile.TemporaryDirectory() as place:
        tree = copied(Path(place))
        for tests in dict.fromkeys(fault.tests for fault in faults):
            if outcome(tree, tests) != PASSED:
                raise SystemExit(f"the tests {tests} fail without a fault: repair them first")
        for fault, text in zip(faults, texts, strict=True):
            path = tree / fault.file
            original = path.read_text()
            path.write_text(text)
            caught = outcome(tree, fault.tests) != PASSED
            path.write_text(original)
            missed += not caught
            print(f"{'caught' if caught else 'MISSED'}  {fault.room}: {fault.file}, "
                  f"{fault.original}", flush=True)  # fmt: skip
    print(f"{len(faults) - missed} of {len(faults)} faults are caught")
    raise SystemExit(missed > MISSED * len(faults))


if __name__ == "__main__":
    main(sys.argv[1:])
