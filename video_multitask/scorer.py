"""Score the candidates of a request, and one score from many behaviours: Π (α_t + p_t)^β_t."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray
from torch import Tensor

from core_gates.errors import GatesError, check_at_least

if TYPE_CHECKING:
    from recsys.ranker import Ranker
    from recsys.schema import Dense, History, Sparse
    from recsys.transform import FeatureTransform


Powers = Mapping[str, float]
LARGEST = float(np.finfo(np.float32).max)


class FusedScore:
    """The product of powers by which a feed orders its candidates.

    Where α is large, a behaviour counts nearly linearly and cannot dominate; where it is 0, in
    proportion, so that a probability of 0 vetoes. Negative exponents lower the rank of what is
    likely to be skipped or hated.

    Args:
        tasks: Names of the T tasks, in the order of the probabilities.
        exponents: β by name; tasks without one do not count.
        offsets: α by name; 0 where not given.

    Raises:
        ValueError: A name is unknown, no exponent is given, or an offset is negative or is 0 where
            the exponent is negative.
    """

    def __init__(
        self,
        tasks: Sequence[str],
        exponents: Mapping[str, float],
        offsets: Mapping[str, float] | None = None,
    ) -> None:
        offsets = dict(offsets or {})
        if strangers := sorted({*exponents, *offsets} - set(tasks)):
            raise ValueError(
                f"the fused score names {', '.join(strangers)}; the tasks are {', '.join(tasks)}"
            )
        if not any(exponents.values()):
            raise ValueError("the fused score needs an exponent other than 0 for one task at least")
        check_at_least(0, **{f"offset of {name}": value for name, value in offsets.items()})
        for name, beta in exponents.items():
            if beta < 0 and not offsets.get(name, 0.0):
                raise ValueError(
                    f"{name} has the exponent {beta} and no offset: a probability of 0 would give "
                    "an infinite score; give it an offset such as 0.1"
                )
        self.tasks = tuple(tasks)
        self.alpha = torch.tensor([offsets.get(name, 0.0) for name in tasks])
        self.beta = torch.tensor([float(exponents.get(name, 0.0)) for name in tasks])

    def log(self, probabilities: Tensor) -> Tensor:
        """Return the logarithm of the score, which orders alike and does not underflow.

        Args:
            probabilities: (..., T).

        Returns:
            (...), −∞ where a task without offset has a probability of 0.

        Raises:
            GatesError: The number of tasks is another one.
        """
        if probabilities.shape[-1] != len(self.tasks):
            raise GatesError(
                f"got probabilities of {probabilities.shape[-1]} tasks, the fused score has "
                f"{len(self.tasks)}"
            )
        counted = self.beta != 0
        base = self.alpha.to(probabilities)[counted] + probabilities[..., counted]
        return (self.beta.to(probabilities)[counted] * base.log()).sum(-1)

    def __call__(self, probabilities: Tensor) -> Tensor:
        """Return the score (...) of probabilities (..., T)."""
        return self.log(probabilities).exp()

    def rank(self, probabilities: Tensor, top: int | None = None) -> Tensor:
        """Return the candidates of a list by descending score.

        Args:
            probabilities: (N, T).
            top: Candidates that are kept; all if None.

        Returns:
            Their numbers (min(N, top),); equal scores keep their order.
        """
        order = self.log(probabilities).argsort(descending=True, stable=True)
        return order if top is None else order[:top]


class Fusion:
    """The fused score of rows, see :class:`video_multitask.scorer.FusedScore`.

    Args:
        tasks: Tasks of the model, in the order of the probabilities.
        exponents: Exponents by name of the task; a task not named does not count.
        offsets: Added to the probabilities, by name of the task; 0 where not given.

    Attributes:
        settings: What it was made of, in values of JSON.

    Raises:
        GatesError: A task is unknown, a number makes no score, or scores can overflow.
    """

    def __init__(self, tasks: Sequence[str], exponents: Powers, offsets: Powers | None) -> None:
        numbers = [*exponents.values(), *(offsets or {}).values()]
        if not all(abs(number) <= LARGEST for number in numbers):
            raise GatesError(f"the fused score needs finite numbers, got {numbers}")
        try:
            self._score = FusedScore(tasks, exponents, offsets)
        except ValueError as error:
            raise GatesError(str(error)) from error
        if self._largest(exponents, offsets or {}) > math.log(sys.float_info.max):
            raise GatesError(
                f"the fused score can exceed {sys.float_info.max:.0e}, got {numbers}: "
                "choose smaller ones, a multiple of them orders alike"
            )
        self.settings: dict[str, Any] = {
            "exponents": dict(exponents),
            "offsets": dict(offsets or {}),
        }

    @staticmethod
    def _largest(exponents: Powers, offsets: Powers) -> float:
        """Return the logarithm of the largest score that any probabilities give."""
        largest = 0.0
        for name, exponent in exponents.items():
            offset = offsets.get(name, 0.0)
            if exponent:
                largest += exponent * math.log(offset + 1 if exponent > 0 else offset)
        return largest

    def __call__(self, probabilities: NDArray[np.float32]) -> NDArray[np.float64]:
        """Return the scores (N,) of probabilities (N, T)."""
        found: NDArray[np.float64] = self._score(torch.from_numpy(probabilities).double()).numpy()
        return found


def fusion_of(
    tasks: Sequence[str], exponents: Powers | None, offsets: Powers | None
) -> Fusion | None:
    """Return the fused score that options ask for; None if they name no exponent.

    Raises:
        GatesError: There are offsets alone, or see :class:`Fusion`.
    """
    if not exponents and offsets:
        raise GatesError("--offsets belong to a fused score: name the exponents by --fused")
    return Fusion(tasks, exponents, offsets) if exponents else None


AT_ONCE = 4096


class Visitor(NamedTuple):
    """What a request says of its user and its moment, ready for any candidates.

    Attributes:
        parts: Of the ranker: embeddings and encoded histories of the user.
        shared: The one raw row of the request.
    """

    parts: Any
    shared: pl.DataFrame


class Scorer:
    """From one row of a user and N rows of candidates to probabilities (N, T) and a ranked list.

    The features of the user, histories included, are encoded and embedded once; those of the moment
    are repeated for the candidates. The result is that of complete rows.

    Args:
        ranker: In evaluation mode, folded if wanted.
        transform: The one that it was trained with.
        fused: Orders candidates; needed by :meth:`rank` alone.
        at_once: Candidates that are scored together, which bounds the memory.

    Raises:
        ValueError: ``at_once`` is not positive.
    """

    def __init__(
        self,
        ranker: Ranker,
        transform: FeatureTransform,
        fused: FusedScore | None = None,
        *,
        at_once: int = AT_ONCE,
    ) -> None:
        check_at_least(1, at_once=at_once)
        self.ranker, self.transform, self.fused = ranker.eval(), transform, fused
        self.at_once = at_once
        schema = transform.schema
        features: list[Sparse | Dense | History]
        features = [*schema.sparse, *schema.dense, *schema.sequences]
        sides = {feature.name: feature.side for feature in features}
        crossed = {name for cross in schema.crossed for name in cross.of}
        self._of_request = [n for n, side in sides.items() if side == "context" or n in crossed]
        self._of_candidates = [n for n, side in sides.items() if side == "item"]

    @torch.inference_mode()
    def visitor(self, request: pl.DataFrame) -> Visitor:
        """Return what is computed once for a request.

        Args:
            request: One row with columns of the user and of the moment; absent ones are missing
                features.

        Raises:
            GatesError: There is not one row, or a value cannot be read.
        """
        if len(request) != 1:
            raise GatesError(f"a request needs one row of its user, got {len(request)}")
        row = self.transform.batch(request, labels=False, fill_absent=True)
        return Visitor(self.ranker.user_inputs(row), request)

    @torch.inference_mode()
    def probabilities(self, visitor: Visitor, candidates: pl.DataFrame) -> Tensor:
        """Return the probabilities (N, T) of all tasks.

        Args:
            visitor: From :meth:`visitor`.
            candidates: N rows with columns of the videos; other columns that they have, such as a
                page of the app, take precedence over those of the request.

        Raises:
            GatesError: A column of the videos is absent, or a value cannot be read.
        """
        if missing := [n for n in self._of_candidates if n not in candidates.columns]:
            raise GatesError(
                f"the candidates lack {', '.join(missing[:5])}; they have "
                f"{', '.join(candidates.columns[:12])}"
            )
        request = visitor.shared
        repeated = [
            name
            for name in self._of_request
            if name in request.columns and name not in candidates.columns
        ]
        rows = candidates.with_columns(
            pl.lit(request[name]).first().alias(name) for name in repeated
        )
        parts = []
        for start in range(0, len(rows), self.at_once):
            some = rows[start : start + self.at_once]
            batch = self.transform.batch(some, labels=False, fill_absent=True)
            parts.append(self.ranker.score_candidates(visitor.parts, batch).sigmoid())
        if not parts:
            return torch.zeros(0, len(self.transform.schema.tasks))
        return torch.cat(parts)

    def rank(
        self, request: pl.DataFrame | Visitor, candidates: pl.DataFrame, top: int | None = None
    ) -> pl.DataFrame:
        """Return candidates by descending fused score, with a column for each task and ``score``.

        Args:
            request: One row, or its :meth:`visitor`.
            candidates: N rows.
            top: Rows that are returned; all if None.

        Raises:
            GatesError: There is no fused score, a column of the result exists, or see
                :meth:`probabilities`.
        """
        if self.fused is None:
            raise GatesError("candidates are ordered by a fused score; give one to the scorer")
        names = self.transform.schema.task_names
        if taken := sorted({*names, "score"} & set(candidates.columns)):
            raise GatesError(f"the candidates have columns {', '.join(taken)}, which are results")
        visitor = request if isinstance(request, Visitor) else self.visitor(request)
        found = self.probabilities(visitor, candidates)
        order = self.fused.rank(found, top)
        columns = {name: found[order, k].numpy() for k, name in enumerate(names)}
        scores = self.fused(found[order]).numpy()
        results = {name: pl.Series(values) for name, values in columns.items()}
        return candidates[order.tolist()].with_columns(**results, score=pl.Series(scores))
