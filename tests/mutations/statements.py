"""Count the statements of the tests, docstrings left out.

``python -m tests.mutations.statements`` prints the number of each folder, and of all.
"""

from collections import Counter

from tests.test_tree import ROOT, module, sources


def counted() -> Counter:
    """Statements of each folder of tests."""
    counts = Counter()
    for path in sources("tests"):
        counts[path.relative_to(ROOT / "tests").parent.as_posix()] += module(path).count
    return counts


if __name__ == "__main__":
    for folder, count in counted().most_common():
        print(f"{count:6d}  {folder}")
    print(f"{counted().total():6d}  statements in all")
