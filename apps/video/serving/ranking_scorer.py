"""The model of ``gates video serve``: many requests, one table, one encoding, one forward pass."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from apps.video.serving.fusion import Fusion, Powers, fusion_of
from apps.video.serving.made_up import made_up
from apps.video.serving.model import Model, read_model, refuse_infinite
from apps.video.serving.requests import Request, RequestReader, fields_of_user
from video_multitask.service.contract import Arrays, RefusedError

Unknown = Literal["refuse", "score"]
WORDS = {"flag": "integer"}  # what has 0 and 1 only may have more on another day
WARM = (1, 16, 128)  # candidates of the requests that warm a model up


class RankingScorer:
    """Ranks candidates; a :class:`video_multitask.service.contract.Scorer`.

    Args:
        model: Loaded.
        fusion: Of the fused score; None for none.
        unknown: What becomes of values that training has not seen: the request is refused, or they
            are scored as *unknown* and counted in the answer.
    """

    def __init__(
        self, model: Model, fusion: Fusion | None = None, unknown: Unknown = "refuse"
    ) -> None:
        self.version, self.tables = model.version, model.scorer
        self.fusion, self.unknown = fusion, unknown
        self.reader = RequestReader(self.tables.transform, self.tables.task_names)
        self._of_user = set(fields_of_user(self.tables.schema))

    @property
    def interface(self) -> dict[str, str]:
        """Fields of requests and tasks of answers, by name."""
        fields = {f"the field {n!r}": WORDS.get(k, k) for n, k in self.reader.kinds.items()}
        return fields | {f"the task {name!r}": "a probability" for name in self.tables.task_names}

    def warm_up(self) -> None:
        """Score candidates of which nothing is known, and rows of values seen in training.

        Raises:
            GatesError: A result is not finite; the model is of no use.
        """
        nothing = dict.fromkeys(self.reader.kinds)
        for rows in WARM:
            found = self.score([Request(nothing, {}, rows, (), best_first=False)])
            refuse_infinite(found, self.version)
        known = self.tables.score(made_up(self.tables.transform, WARM[-1])).probabilities
        refuse_infinite({"p": known}, self.version)

    def read(self, content: Any, max_rows: int) -> Request:
        """Check a request, see :mod:`apps.video.serving.requests`."""
        return self.reader.read(content, max_rows)

    def score(self, requests: Sequence[Request]) -> Arrays:
        """Return ``p`` (N, T), ``score`` (N,) and ``unknown`` (N, F) of all candidates."""
        lists: list[int] = []
        if self.tables.encodes_users and not any(map(self._differ, requests)):
            lists = [len(request) for request in requests]
        found = self.tables.score(self.reader.table(requests), lists)
        arrays = {"p": found.probabilities, "unknown": found.unknown}
        if self.fusion is not None:
            arrays["score"] = self.fusion(found.probabilities)
        return arrays

    def answer(self, request: Request, found: Arrays) -> Mapping[str, Any]:
        """Return the model, the tasks, and for each candidate its place, probabilities and score.

        Raises:
            RefusedError: A value was not seen in training, and such requests are refused; or the
                best are wanted first, but there is no score.
        """
        order = np.arange(len(request))
        if request.best_first:
            if "score" not in found:
                raise RefusedError(
                    "best_first: the service has no fused score: leave it out, or serve with "
                    "--fused"
                )
            order = np.argsort(-found["score"], kind="stable")
        names = self.tables.task_names
        answer: dict[str, Any] = {
            "model": self.version,
            "tasks": [names[i] for i in request.tasks],
            "candidates": order.tolist(),
            "probabilities": found["p"][order][:, list(request.tasks)].tolist(),
        }
        if "score" in found:
            answer["scores"] = found["score"][order].tolist()
        return answer | {"unknown": self._unknown(found)}

    def _differ(self, request: Request) -> bool:
        """Return whether the candidates have separate values of a field of the user."""
        return not self._of_user.isdisjoint(request.columns)

    def _unknown(self, found: Arrays) -> dict[str, int]:
        """Return in how many candidates each field has a value that training has not seen."""
        counts = dict(zip(self.tables.sparse_names, found["unknown"].sum(0).tolist(), strict=True))
        counts = {name: int(count) for name, count in counts.items() if count}
        if counts and self.unknown == "refuse":
            name = next(iter(counts))
            row = int(found["unknown"][:, self.tables.sparse_names.index(name)].argmax())
            raise RefusedError(
                f"candidates[{row}].{name} has a value that training has not seen: correct it, or "
                "serve with --unknown score"
            )
        return counts


def loader(
    exponents: Powers | None = None,
    offsets: Powers | None = None,
    unknown: Unknown = "refuse",
    *,
    int8: bool = False,
) -> Callable[[Path], RankingScorer]:
    """Return what loads model folders for a service."""

    def load(folder: Path) -> RankingScorer:
        model = read_model(folder, int8=int8)
        fusion = fusion_of(model.scorer.task_names, exponents, offsets)
        return RankingScorer(model, fusion, unknown)

    return load
