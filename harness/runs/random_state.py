"""The state of every random generator of a process, as plain tensors that a checkpoint may hold."""

import random

import numpy as np
import torch
from torch import Tensor

NONE = torch.nan  # stands for python's "no second normal deviate kept"


def capture() -> dict[str, Tensor]:
    """State of the generators of python, numpy, torch and the process's CUDA device.

    Returns:
        Tensors of fixed shape, safe to load with ``weights_only=True``: ``python`` (626,) and
        ``numpy`` (627,) int64, ``python_gauss`` (1,) float64, ``torch`` and ``cuda`` uint8.
    """
    version, words, gauss = random.getstate()
    states = {
        "python": torch.tensor([version, *words], dtype=torch.int64),
        "python_gauss": torch.tensor([NONE if gauss is None else gauss], dtype=torch.float64),
        "numpy": _numpy_state(),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def restore(states: dict[str, Tensor]) -> None:
    """Set every generator to a state of :func:`capture`; that of an absent GPU is left out."""
    version, *words = states["python"].tolist()
    gauss = float(states["python_gauss"])
    random.setstate((version, tuple(words), None if gauss != gauss else gauss))
    _set_numpy_state(states["numpy"].cpu().numpy())
    torch.set_rng_state(states["torch"].cpu())
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"].cpu())


def gather(states: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    """The tensors of all ranks, in order of rank; every rank must call it."""
    own = {name: state.cpu() for name, state in states.items()}
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return [own]
    ranks: list[dict[str, Tensor]] = [{} for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather_object(ranks, own)
    return ranks


def _numpy_state() -> Tensor:
    state = np.random.get_state(legacy=False)  # noqa: NPY002 (the global generator is meant)
    key, position = state["state"]["key"], state["state"]["pos"]
    gauss = np.array([state["gauss"]], dtype=np.float64).view(np.int64)
    words = [key.astype(np.int64), np.array([position, state["has_gauss"]]), gauss]
    return torch.from_numpy(np.concatenate(words))


def _set_numpy_state(words: np.ndarray) -> None:
    np.random.set_state(  # noqa: NPY002 (the global generator is meant)
        {
            "bit_generator": "MT19937",
            "state": {"key": words[:624].astype(np.uint32), "pos": int(words[624])},
            "has_gauss": int(words[625]),
            "gauss": float(words[626:627].view(np.float64)[0]),
        }
    )
