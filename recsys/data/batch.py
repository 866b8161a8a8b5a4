"""Batches, also under this name; :mod:`recsys.batch` defines them."""

from recsys.batch import Batch

__all__ = ["Batch"]
