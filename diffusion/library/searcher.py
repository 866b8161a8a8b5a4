"""Adapters found by a prompt, from weights or metadata, and adapters that are alike; exact."""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from core_gates.errors import check_option
from diffusion.library.database import Catalog, Matrix, Vectors
from diffusion.library.paths import LibraryError
from diffusion.library.prompts import COMMON, UNRELATED, WORD, least_cosine, told_words
from diffusion.library.record import (
    Adapter,
    Filters,
    Match,
    Neighbor,
    Results,
    TextEncoder,
    WeightEncoder,
)
from diffusion.lora_file import Factors, LoraBundle, LoraFileError
from diffusion.lora_file.container import clean

NEAR = 0.98  # cosine from which two adapters count as near-duplicates

_HELD = 2**27
"""Numbers of factors that are held in memory; those of a larger adapter are read each time."""
_ROUNDING = 1e-9  # of cosines in float64


def inner(one: Factors, two: Factors) -> float:
    """Return ⟨ΔW₁, ΔW₂⟩ (Frobenius) of the changes of one layer, in float64."""
    outputs = one.up.double().T @ two.up.double()
    inputs = one.down.double() @ two.down.double().T
    return one.scale * two.scale * float(torch.sum(outputs * inputs))


class Subject:
    """An adapter that others are compared with.

    Args:
        bundle: The adapter.

    Raises:
        LibraryError: Its change is zero or not finite.
    """

    def __init__(self, bundle: LoraBundle) -> None:
        self.family, self.sizes, self.norms = bundle.family, bundle.sizes(), bundle.norms()
        self.norm = math.hypot(*self.norms.values())
        if not 0 < self.norm < math.inf:
            raise LibraryError(
                f"the change of the adapter has the norm {self.norm}: there is nothing like it"
            )
        numbers = sum(s.rank * (s.in_features + s.out_features) for s in self.sizes.values())
        self._modules = dict(bundle.modules) if numbers <= _HELD else bundle.modules

    def bound(self, one: Adapter, norms: Mapping[str, float]) -> float:
        """Return an upper bound of the cosine with another adapter (Cauchy-Schwarz by layer)."""
        shared = math.fsum(norm * norms.get(name, 0.0) for name, norm in self.norms.items())
        return shared / (self.norm * one.norm)

    def compared(self, one: Adapter, bundle: LoraBundle) -> tuple[float, int] | None:
        """Return cosine and number of shared layers with another adapter; None if sizes differ."""
        theirs = bundle.sizes()
        shared = [name for name in self.sizes if name in theirs]
        if any(theirs[name][1:] != self.sizes[name][1:] for name in shared):
            return None
        total = math.fsum(inner(self._modules[name], bundle.modules[name]) for name in shared)
        return min(1.0, max(-1.0, total / (self.norm * one.norm))), len(shared)


def nearest_adapters(
    subject: Subject,
    candidates: Iterable[tuple[Adapter, Mapping[str, float]]],
    k: int,
    load: Callable[[Adapter], LoraBundle],
    done: Callable[[int], object],
) -> tuple[tuple[Neighbor, ...], int, int]:
    """Return the k adapters of the largest cosine, exactly; files are read one at a time.

    Those whose bound is below the k-th cosine so far are not read.

    Args:
        subject: What they are compared with.
        candidates: Of the same family, each with ‖ΔW‖ of its layers.
        k: Adapters wanted.
        load: Reads one; its LibraryError or LoraFileError skips it.
        done: Called with the number of candidates that are decided.

    Returns:
        What was found, the best first and the lowest id among equals; how many are for models of
        another size; how many could not be read.
    """
    bounds = [(subject.bound(*pair), pair[0]) for pair in candidates]
    bounds.sort(key=lambda pair: (-pair[0], pair[1].id))
    neighbors: list[Neighbor] = []
    compared: dict[str, tuple[float, int] | None] = {}
    others = unread = 0
    for number, (bound, adapter) in enumerate(bounds):
        done(number)
        if len(neighbors) == k and bound < neighbors[-1].cosine - _ROUNDING:
            break
        try:
            if adapter.digest not in compared:
                compared[adapter.digest] = subject.compared(adapter, load(adapter))
        except (LibraryError, LoraFileError):
            unread += 1
            continue
        if (likeness := compared[adapter.digest]) is None:
            others += 1
        else:
            cosine, shared = likeness
            neighbors.append(Neighbor(adapter, cosine, cosine >= NEAR, shared))
            neighbors = sorted(neighbors, key=lambda like: (-like.cosine, like.adapter.id))[:k]
    done(len(bounds))
    return tuple(neighbors), others, unread


def unit_vector(vector: Tensor, dim: int) -> Vectors:
    """Return an embedding as float32 numbers (dim,) of unit length.

    Raises:
        LibraryError: It has another size, is not finite, or is zero.
    """
    values = vector.detach().double().cpu().numpy()
    length = float(np.linalg.norm(values))
    if values.shape != (dim,) or not np.isfinite(length) or length == 0:
        raise LibraryError(
            f"an encoder gives a vector of shape {values.shape} and length {length:g}, expected "
            f"({dim},) and 1: choose another encoder"
        )
    return (values / length).astype(np.float32)


Scores = NDArray[np.floating]
Positions = NDArray[np.int64]

SLACK = 1e-5
"""More than float32 products of unit vectors are off; what is that close is computed again."""

_EXACT_ROWS = 1 << 12


def dots(matrix: Vectors, query: Vectors) -> Vectors:
    """Return the product of each row (n, dim) with a vector (dim,).

    The matrix may lie on the disk: nothing of it is copied. Rows that are not in use may hold
    anything, NaN included.
    """
    with np.errstate(all="ignore"):
        return matrix @ query


def exact_dots(matrix: Vectors, rows: Positions, query: Vectors) -> NDArray[np.float64]:
    """Return the products of some rows with a vector in float64, equal for equal rows."""
    wide = query.astype(np.float64)
    parts = [
        np.einsum("ij,j->i", matrix[rows[start : start + _EXACT_ROWS]].astype(np.float64), wide)
        for start in range(0, len(rows), _EXACT_ROWS)
    ]
    return np.concatenate(parts) if parts else np.empty(0)


def best(
    scores: Scores, k: int, exact: Callable[[Positions], Scores], slack: float = SLACK
) -> tuple[Positions, Scores]:
    """Return the positions of the k best scores, the best first, and these scores.

    Args:
        scores: Approximate ones (n,).
        k: Positions wanted; fewer if there are fewer.
        exact: Returns the scores of some positions; equal ones go to the lowest position.
        slack: Largest error of an approximate score.
    """
    count = min(k, len(scores))
    if count < 1:
        return np.empty(0, np.int64), np.empty(0)
    place = len(scores) - count
    bound = np.partition(scores, place)[place] - 2 * slack
    near = np.flatnonzero(scores >= bound)
    values = exact(near)
    order = np.lexsort((near, -values))[:count]
    return near[order], values[order]


_MOST = 16


class Served(NamedTuple):
    """The adapters that pass filters.

    Attributes:
        ids: Of adapters (n,), ascending.
        rows: Of the matrix (n,); -1 for adapters that are not found by their weights.
        copies: Adapters that share a row with an earlier one.
        view: The matrix.
        lacking: How many have no row, and of which families; empty if there are none.
    """

    ids: Positions
    rows: Positions
    copies: int
    view: Vectors
    lacking: str = ""


MODES = ("names", "weights", "metadata", "hybrid")
NO_ENCODER = "no encoder is given"

_SAMPLE = 4096  # adapters whose cosines with unrelated prompts are looked at

_WORDS = 128
_ATTEMPTS = 8


class Mix(NamedTuple):
    """Weights a and b of the hybrid score a · cosine + b · fraction of the words found."""

    weights: float = 1.0
    metadata: float = 0.0


_NAMED = Mix(1.0, 3.0)  # what is named comes before others, whose cosines differ by 2 at most
_CALLED = "{title triggers name} :"  # columns of what adapters are called

Ranked = tuple[int, float, float | None, float | None]
"""Id, score, cosine and fraction of the words of an adapter before it is looked up."""


class Searcher:
    """Searches an index.

    Args:
        catalog: Of the index.
        encoder: Whose embeddings are searched; None if only metadata can be.
        text_encoder: Of prompts.
        lenient: Find files that the strict reader refuses by their weights, too.
        least: Smallest cosine that is found; None for what unrelated prompts do not reach.
    """

    def __init__(
        self,
        catalog: Catalog,
        encoder: WeightEncoder | None,
        text_encoder: TextEncoder | None,
        lenient: bool,
        least: float | None = None,
    ) -> None:
        self.catalog, self.encoder, self.text_encoder = catalog, encoder, text_encoder
        self.lenient, self.least = lenient, least
        self._reached: tuple[Served | None, float] = None, -1.0
        self._known: dict[tuple[tuple[int, int], Filters], Served] = {}

    def search(
        self, prompt: str, k: int, mode: str, mix: Mix, filters: Filters, *, whole: bool = False
    ) -> Results[Match]:
        """Return the k best adapters; all of them if ``whole`` and the best is high enough.

        Raises:
            LibraryError: The prompt is empty, k is not positive, a weight is not finite, the mode
                is unknown, nothing is indexed, or the prompt is encoded into another space.
        """
        check_option("mode", mode, MODES, LibraryError)
        if not (prompt := clean(prompt).strip()):
            raise LibraryError("the prompt is empty: describe what the adapter should do")
        if k < 1:
            raise LibraryError(f"--k is {k}, expected 1 or more")
        if mode != "hybrid" and mix != Mix():
            raise LibraryError(
                f"--weights and --metadata change nothing in --mode {mode}: leave them out, or "
                "search by --mode hybrid"
            )
        if not all(map(math.isfinite, mix)):
            raise LibraryError(
                f"the weights of the score are {mix.weights} and {mix.metadata}, expected finite "
                "numbers"
            )
        if not self.catalog.database.one("SELECT 1 FROM adapter WHERE error = ''"):
            raise LibraryError("the index holds no adapter: index a folder that has some")
        query = None if mode == "metadata" else self._queries([prompt])
        for _ in range(_ATTEMPTS):  # another process may write meanwhile
            version = self.catalog.database.version()
            results = self._search(prompt, k, query, mode, mix, filters, whole)
            if self.catalog.database.version() == version:
                break
        return results

    def _queries(self, prompts: Sequence[str]) -> Vectors | None:
        """Return the embeddings of prompts (prompts, dim); None without encoders."""
        if self.encoder is None or self.text_encoder is None:
            return None
        with torch.no_grad():
            embeddings = self.text_encoder.embed(prompts)
        return np.stack(
            [unit_vector(embedding.reshape(-1), self.encoder.dim) for embedding in embeddings]
        )

    def _floor(self, encoder: WeightEncoder) -> float:
        """Return the smallest cosine that is found."""
        if self.least is not None:
            return self.least
        served = self._served(encoder, Filters())
        if served is not self._reached[0] and (queries := self._queries(UNRELATED)) is not None:
            rows = served.rows[served.rows >= 0]
            vectors = served.view[rows[:: 1 + len(rows) // _SAMPLE]]
            self._reached = served, least_cosine(vectors, queries)
        return self._reached[1]

    def _served(self, encoder: WeightEncoder, filters: Filters) -> Served:
        """Return the adapters that pass filters, and what an encoder has encoded of them."""
        key = self.catalog.database.version(), filters
        if key in self._known:
            return self._known[key]
        if len(self._known) >= _MOST:
            self._known.clear()
        view = Matrix(self.catalog.folder, encoder.fingerprint, encoder.dim).view()
        condition, values = filters.sql()
        values |= {"own": encoder.fingerprint, "lenient": self.lenient, "end": len(view)}
        found = self.catalog.database.all(
            "SELECT a.id, CASE WHEN a.searchable AND (:lenient OR a.problem = '') AND e.row < :end "
            "THEN e.row ELSE -1 END, a.family FROM adapter a LEFT JOIN encoding e ON "
            "e.fingerprint = :own AND e.digest = a.digest "
            f"WHERE a.error = '' AND {condition} ORDER BY a.id",
            values,
        )
        ids, rows = (np.array([row[column] for row in found], np.int64) for column in (0, 1))
        families = Counter(family for _, row, family in found if row < 0)
        listed = ", ".join(f"{number} {name}" for name, number in families.most_common(4))
        lacking = (
            f"{families.total()} of {len(ids)} adapters have no embedding of this encoder, which "
            f"serves {encoder.family} ({listed})"
        )
        copies = int((rows >= 0).sum()) - len(np.unique(rows[rows >= 0]))
        self._known[key] = Served(ids, rows, copies, view, lacking if families else "")
        return self._known[key]

    def _search(
        self, prompt: str, k: int, query: Vectors | None, mode: str, mix: Mix, filters: Filters,
        whole: bool,
    ) -> Results[Match]:  # fmt: skip
        named = self._named(prompt, filters) if mode == "names" else {}
        if query is None or self.encoder is None:
            reason = "" if mode == "metadata" else NO_ENCODER
            return self._by_metadata(prompt, k, filters, named, reason)
        served = self._served(self.encoder, filters)
        if not len(served.ids):
            return Results((), mode, f"no adapter has {filters}")
        if served.rows.max() < 0:
            return self._by_metadata(prompt, k, filters, named, served.lacking)
        words = self._words(prompt, filters) if mode == "hybrid" else dict.fromkeys(named, 1.0)
        mix = {"hybrid": mix, "names": _NAMED}.get(mode, Mix())
        matches = self._matches(self._ranked(query[0], k, served, words, mix), k)
        if mode == "names":
            matches = tuple(
                match._replace(
                    score=1.0 if match.weights is None else match.weights,
                    metadata=None,
                    named=named.get(match.adapter.id, ""),
                )
                for match in matches
            )
        floor = self._floor(self.encoder)
        low = {
            match.name: match.weights
            for match in matches
            if match.weights is not None
            and match.weights < floor
            and not match.named
            and not (mix.metadata and match.metadata)
        }
        kept = tuple(match for match in matches if match.name not in low)
        if whole and kept and not any(match.named for match in kept):
            kept, low = matches, {}
        more = sorted({*named.values()} - {match.named for match in matches})
        unused = f"the prompt names {', '.join(more)}, too: --k {k + len(more)} considers all"
        notices = "; ".join(filter(None, (served.lacking, unused * bool(more))))
        return Results(kept, mode, notices, low, floor)

    def similarities(self, names: Sequence[str]) -> tuple[Vectors, str]:
        """Return the cosines of K adapters with each other (K, K), and what encodes them.

        Raises:
            LibraryError: There is no encoder, or it has not encoded one of them.
        """
        if self.encoder is None:
            raise LibraryError(f"{NO_ENCODER}: adapters cannot be compared by their embeddings")
        served = self._served(self.encoder, Filters())
        rows = dict(zip(served.ids.tolist(), served.rows.tolist(), strict=True))
        places = [rows.get(self.catalog.find(name).id, -1) for name in names]
        if lacking := [name for name, row in zip(names, places, strict=True) if row < 0]:
            raise LibraryError(f"{lacking[0]!r} has no embedding of this encoder: index it again")
        vectors = served.view[places]
        return vectors @ vectors.T, self.encoder.fingerprint

    def _by_metadata(
        self, prompt: str, k: int, filters: Filters, named: Mapping[int, str], reason: str
    ) -> Results[Match]:
        """Search metadata, for a reason if it was not asked for; what is named comes first."""
        words = self._words(prompt, filters, flagged=not reason)
        ranked: list[Ranked] = [(i, share, None, share) for i, share in words.items()]
        ranked.sort(key=lambda pair: pair[0] not in named)
        matches = tuple(
            match._replace(named=named.get(match.adapter.id, ""))
            for match in self._matches(ranked, k)
        )
        notices = [
            f"{reason}: only metadata is searched" if reason else "",
            "" if ranked else "no metadata holds a word of the prompt",
        ]
        return Results(matches, "metadata", "; ".join(filter(None, notices)))

    def _ranked(
        self, query: Vectors, k: int, served: Served, words: dict[int, float], mix: Mix
    ) -> list[Ranked]:
        """Rank by the hybrid score; an adapter without an embedding by its second part alone."""
        used = served.rows >= 0
        if mix.metadata > 0:
            used |= np.isin(served.ids, list(words))
        ids, rows, view = served.ids[used], served.rows[used], served.view
        cosines = np.where(rows >= 0, dots(view, query)[rows], 0)
        bonus = np.array([words.get(number, 0.0) for number in ids.tolist()]) if words else 0 * ids

        def exact_cosines(near: Positions) -> NDArray[np.float64]:
            values, has_row = np.zeros(len(near)), rows[near] >= 0
            values[has_row] = exact_dots(view, rows[near[has_row]], query)
            return values

        def exact(near: Positions) -> NDArray[np.float64]:
            return mix.weights * exact_cosines(near) + mix.metadata * bonus[near]

        near, values = best(
            mix.weights * cosines + mix.metadata * bonus if mix != Mix() else cosines,
            k + served.copies + int((rows < 0).sum()),
            exact,
            SLACK * max(1.0, abs(mix.weights)),
        )
        weights = exact_cosines(near)
        return [
            (
                int(ids[place]),
                float(values[rank]),
                float(weights[rank]) if rows[place] >= 0 else None,
                float(bonus[place]) if words else None,
            )
            for rank, place in enumerate(near.tolist())
        ]

    def _words(self, prompt: str, filters: Filters, *, flagged: bool = False) -> dict[int, float]:
        """Return the fraction of the words of a prompt that the metadata of adapters hold, by id.

        Common words do not count. Words are quoted: nothing in a prompt is an operator.

        Args:
            prompt: Of any origin.
            filters: That adapters pass.
            flagged: Whether adapters count that no search by weights may return.
        """
        asked = [word for word in WORD.findall(prompt.casefold()) if word not in COMMON]
        return self.catalog.holding(list(dict.fromkeys(asked))[:_WORDS], filters, flagged)

    def _named(self, prompt: str, filters: Filters) -> dict[int, str]:
        """Return what a prompt calls adapters by, by id: their whole name, title or trigger."""
        asked = told_words(prompt)
        near = self.catalog.holding(asked.split()[:_WORDS], filters, False, _CALLED)
        called_by = {}
        for adapter in self.catalog.among("id", list(near)):
            for called in (adapter.title, *adapter.triggers, adapter.name):
                words = told_words(called)
                if words.strip() and words in asked:
                    called_by[adapter.id] = called
                    break
        return called_by

    def _matches(self, ranked: list[Ranked], k: int) -> tuple[Match, ...]:
        """Look the first k contents up; files with the same content count once."""
        adapters = {
            pair.id: pair for pair in self.catalog.among("id", [pair[0] for pair in ranked])
        }
        kept: dict[str, Ranked] = {}
        for pair in ranked:
            if pair[0] in adapters and len(kept) < k:
                kept.setdefault(adapters[pair[0]].digest, pair)
        copies = self.catalog.among("digest", list(kept))
        return tuple(
            Match(
                adapters[number],
                score,
                weights,
                metadata,
                tuple(copy.path for copy in copies if copy.digest == digest and copy.id != number),
            )
            for digest, (number, score, weights, metadata) in kept.items()
        )
