"""Optional: embedding tables of TorchRec, to be sharded by its planner.

The library does not need TorchRec. This adapter is for those who run it already.
"""

from __future__ import annotations

import importlib
import importlib.metadata
from typing import Any, cast

import torch
from torch import Tensor, nn

from core_gates.errors import GatesError, MissingExtraError
from recsys.embedding.bank import EmbeddingBank

VERSIONS = {"torchrec": "1.9.2", "fbgemm-gpu": "1.8.0"}
"""The pair that loads with torch 2.13; torchrec's default, fbgemm-gpu 1.9.0, does not."""

INSTALL = (
    "pip install tensordict iopath pyre-extensions tabulate && "
    "pip install --no-deps torchrec==1.9.2 fbgemm-gpu-cpu==1.8.0"
)


class MissingTorchRecError(MissingExtraError):
    """TorchRec is not installed, or not in the versions that work together.

    Args:
        found: What is wrong.
    """

    def __init__(self, found: str) -> None:
        wanted = " and ".join(f"{name} {version}" for name, version in VERSIONS.items())
        GatesError.__init__(self, f"TorchRec tables need {wanted}, {found}: {INSTALL}")


def check_versions() -> None:
    """Refuse a missing TorchRec, and versions that are not known to work together.

    Raises:
        MissingTorchRecError: One is missing or has another version.
    """
    for name, wanted in VERSIONS.items():
        distributions = (name, f"{name}-cpu") if name == "fbgemm-gpu" else (name,)
        found = [version for each in distributions if (version := _version(each))]
        if not found:
            raise MissingTorchRecError(f"{name} is not installed")
        if wanted not in (version.partition("+")[0] for version in found):
            raise MissingTorchRecError(f"found {name} {found[0]}")


class TorchRecTables(nn.Module):
    """Stacked tables as an ``EmbeddingCollection``, which ``DistributedModelParallel`` shards.

    On one process gradients are sparse, for
    :class:`~recsys.embedding.row_wise_adagrad.RowWiseAdagrad`; sharded tables get their optimizer
    from ``apply_optimizer_in_backward``, before they are sharded.

    Args:
        table: Tables (rows, d) to begin with.

    Shape:
        Row numbers (...) to vectors (..., d).

    Raises:
        MissingTorchRecError: TorchRec is missing or has another version.
    """

    def __init__(self, table: Tensor) -> None:
        check_versions()
        super().__init__()
        torchrec = _torchrec()
        self.num_embeddings, self.embedding_dim = table.shape
        config = torchrec.EmbeddingConfig(
            name="tables",
            num_embeddings=self.num_embeddings,
            embedding_dim=self.embedding_dim,
            feature_names=["rows"],
            data_type=torchrec.modules.embedding_configs.dtype_to_data_type(table.dtype),
        )
        self.collection = torchrec.EmbeddingCollection(tables=[config], device=table.device)
        self.collection.embeddings["tables"].sparse = True
        with torch.no_grad():
            self.weight.copy_(table)

    @property
    def weight(self) -> nn.Parameter:
        """All rows; those of one process only."""
        return cast(nn.Parameter, self.collection.embeddings["tables"].weight)

    def forward(self, rows: Tensor) -> Tensor:
        """Return the vectors of rows."""
        jagged = _torchrec().KeyedJaggedTensor(
            keys=["rows"], values=rows.flatten(), lengths=rows.new_full((1,), rows.numel())
        )
        found = self.collection(jagged)["rows"].values()
        return cast(Tensor, found.view(*rows.shape, self.embedding_dim))


def use_torchrec(module: nn.Module) -> None:
    """Replace the tables of all banks of a module by those of TorchRec; in place, values kept.

    Args:
        module: A :class:`~recsys.ranker.Ranker`, or anything that contains banks.

    Raises:
        MissingTorchRecError: TorchRec is missing or has another version.
    """
    check_versions()
    for bank in module.modules():
        if isinstance(bank, EmbeddingBank):
            for name, stack in bank.stacks.items():
                bank.stacks[name] = TorchRecTables(cast(Tensor, stack.weight).detach())


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _torchrec() -> Any:
    return importlib.import_module("torchrec")
