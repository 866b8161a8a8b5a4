"""Encoders by the name that a schema gives them."""

from collections.abc import Mapping
from typing import Any

import torch

from recsys.schema import History
from recsys.sequence.encoder import HistoryEncoder
from recsys.sequence.mean import MeanEncoder
from recsys.sequence.target_attention import TargetAttention
from recsys.sequence.transformer import TransformerEncoder


def build_encoder(
    history: History,
    dim: int,
    options: Mapping[str, Any] | None = None,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> HistoryEncoder:
    """Return the encoder of a history.

    Args:
        history: History, which names the encoder.
        dim: Features of its items.
        options: Further arguments of the encoder, by name.
        device: Device of the parameters.
        dtype: Floating dtype of the parameters.

    Raises:
        ValueError: The encoder has no such option.
    """
    made = dict(options or {})
    try:
        if history.encoder == "mean":
            return MeanEncoder(dim, **made)
        placed: dict[str, Any] = {"device": device, "dtype": dtype}
        if history.encoder == "target_attention":
            return TargetAttention(dim, **made, **placed)
        return TransformerEncoder(dim, **{"max_length": history.max_length} | made, **placed)
    except TypeError as error:
        raise ValueError(
            f"the encoder of history {history.name!r} cannot be built: {error}"
        ) from error
