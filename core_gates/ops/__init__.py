"""Operators: one formula each in ``elementwise.py``, and folders of those that have kernels.

In a folder the definition (``reference.py``) is differentiable PyTorch, a kernel (``kernel.py``)
computes the same numbers on CUDA, and ``op.py`` chooses between them; `kernels` overrides the
choice.
"""

import sys
from types import ModuleType

from core_gates.lazy import exports

__getattr__, __dir__, __all__ = exports(__name__, __file__)


class _Operators(ModuleType):
    """Importing the folder of an operator does not replace the function."""

    def __setattr__(self, name: str, value: object) -> None:
        if not (name in __all__ and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Operators
