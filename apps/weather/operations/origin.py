"""What every store says of the program that made it."""

from __future__ import annotations

from harness.runs.environment import git_revision, package_version


def made_by() -> dict[str, str]:
    """Return version and revision of the package, by the names of attributes; known ones only."""
    found = {"gatesuite_version": package_version("gatesuite"), "revision": git_revision()}
    return {name: value for name, value in found.items() if value is not None}
