"""Do the numbers come out as elsewhere: golden vectors, formats, other libraries, closed forms?"""

from __future__ import annotations

import hashlib
from functools import partial
from pathlib import Path
from typing import Any

import core_gates
import diffusion
from apps.diffusion.studies.study import Asked
from apps.diffusion.works.parity import run_checks
from apps.diffusion.world import World
from core_gates.errors import GatesError
from diffusion.evaluation.parity.checks import BOUNDS, GROUPS
from diffusion.evaluation.parity.golden.vectors import check_vectors
from harness.evidence import Bar, Row
from harness.experiment import Figures
from harness.files import Data, short_digest


def parity_study(asked: Asked, world: World) -> None:
    """Score the worst case of every check; results are of the code and the vectors at hand.

    Raises:
        GatesError: No folder of golden vectors is given, or it lacks some.
    """
    del world
    if asked.vectors is None:
        raise GatesError(
            "parity needs the folder of the golden vectors: give --vectors, such as "
            "--vectors tests/golden/autolora"
        )
    check_vectors(asked.vectors)
    run, vectors = asked.run, digest_of(asked.vectors, "*")
    store = run.store("checks", Figures())
    code = short_digest([digest_of(Path(p.__file__ or "").parent, "*.py", "*.cpp", "*.h")
                         for p in (core_gates, diffusion)])  # fmt: skip
    pieces = [run.piece(group, keys={"of": code}, vectors=vectors) for group in GROUPS]
    made = run.obtain(
        store, pieces, partial(run_checks, vectors=asked.vectors.resolve()), scoring=True
    )
    found = {piece.method: store.load(piece) for piece in made}
    rows, bars = scored(found)
    checked = sum(row.n for row in rows)
    met = sum(bar.met for bar in bars)
    run.finish(
        rows,
        bars,
        seeds=[0],
        data=[Data("vectors", "all", vectors, checked, "comparisons")],
        headline=f"{met} of {len(bars)} figures of {checked:,} comparisons agree.",
    )


def scored(found: dict[str, dict[str, Any]]) -> tuple[list[Row], list[Bar]]:
    """Return a row and a bar for each figure; one without a bound is an error of the code."""
    rows, bars = [], []
    for group, figures in found.items():
        for name, check in figures.items():
            rows.append(Row(name, group, "worst", float(check["value"]), n=int(check["n"])))
            bound = BOUNDS[name]
            away = float(check["value"])
            if bound.target:
                away = round(abs(away - bound.target), 6)
            title = f"{name} − {bound.target:g}" if bound.target else name
            bars.append(Bar(title, away, "<=", bound.tolerance))
    return rows, bars


def digest_of(folder: Path, *patterns: str) -> str:
    """Return 16 hexadecimal digits of the files of a folder."""
    digest = hashlib.sha256()
    for path in sorted({one for p in patterns for one in folder.rglob(p) if one.is_file()}):
        digest.update(f"{path.relative_to(folder).as_posix()}\n".encode())
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()[:16]
