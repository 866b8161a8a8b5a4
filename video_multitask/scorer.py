"""Score the candidates of a request: what is of the user is computed once for all of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import polars as pl
import torch
from torch import Tensor

from core_gates.errors import GatesError, check_at_least
from video_multitask.fused_score import FusedScore

if TYPE_CHECKING:
    from recsys.ranker import Ranker
    from recsys.schema import Dense, History, Sparse
    from recsys.transform import FeatureTransform

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
