"""Fused operators: each folder holds a definition, a Triton kernel and the public function.

The definition (``reference.py``) is differentiable PyTorch, the kernel (``kernel.py``) computes the
same numbers on CUDA, and ``op.py`` chooses between them; :func:`kernels` overrides the choice.
"""

from core_gates.ops._select import kernels

__all__ = ["kernels"]
