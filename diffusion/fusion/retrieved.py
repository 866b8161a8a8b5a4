"""What a search by weights knows of the adapters that it retrieves for captions."""

from collections.abc import Mapping
from typing import NamedTuple, Self

import torch
from torch import Tensor
from torch.nn.functional import normalize

from core_gates.adapters.relevance import MOST
from core_gates.errors import GatesError


class Retrieved(NamedTuple):
    """K adapters that suit captions best.

    Attributes:
        names: Of the adapters, the best first.
        cosines: Of captions and adapters (N, K).
        similarities: Cosines of the adapters with each other (K, K).
        encoder: Fingerprint of what embedded them; empty if unknown.
    """

    names: tuple[str, ...]
    cosines: Tensor
    similarities: Tensor
    encoder: str = ""

    def of(self, rows: Tensor) -> Self:
        """Return what is known for some captions, by their places (n,)."""
        return self._replace(cosines=self.cosines[rows])


def retrieve(
    text: Tensor, vectors: Mapping[str, Tensor], k: int = 6, *, encoder: str = ""
) -> Retrieved:
    """Return the adapters with the largest mean cosine with captions of one image or one kind.

    Args:
        text: Embeddings of the captions (N, E).
        vectors: Name -> embedding of an adapter (E,).
        k: Adapters to retrieve, 1 to 8; all where there are fewer.
        encoder: Fingerprint of what embedded them.

    Raises:
        GatesError: k is out of range, there is no embedding, or one has another size than captions.
    """
    if not 1 <= k <= MOST:
        raise GatesError(f"k is {k}, expected 1 to {MOST} adapters: a gate opens at most {MOST}")
    if not vectors:
        raise GatesError("the library has no embeddings of adapters: index it with an encoder")
    sizes = {tuple(vector.shape) for vector in vectors.values()}
    if sizes != {text.shape[1:]}:
        raise GatesError(
            f"embeddings of adapters have sizes {sorted(sizes)}, those of captions"
            f" {tuple(text.shape[1:])}: embed both with one encoder"
        )
    names = list(vectors)
    stacked = normalize(torch.stack([vectors[name] for name in names]).float(), dim=-1)
    cosines = normalize(text.float(), dim=-1) @ stacked.mT
    best = cosines.mean(0).topk(min(k, len(names))).indices
    taken = tuple(names[place] for place in best.tolist())
    return Retrieved(taken, cosines[:, best], stacked[best] @ stacked[best].mT, encoder)
