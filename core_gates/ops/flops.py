"""FLOPs of the grouped ops for PyTorch's counter; importing this module is enough.

``torch.utils.flop_counter`` imports Triton, which the ops themselves do not need.
"""

import math
from typing import Any

import torch
from torch import Size
from torch.utils.flop_counter import register_flop_formula

from core_gates.ops.grouped_linear import op as _linear  # noqa: F401
from core_gates.ops.grouped_mlp import op as _mlp  # noqa: F401

# Sizes alone count, on the meta device too: rows that belong to no group count as if they did.


@register_flop_formula(torch.ops.core_gates.grouped_linear)
def _(x: Size, weight: Size, *arguments: Any, out_shape: Any) -> int:  # noqa: ARG001
    gather = arguments[2]
    return 2 * (x if gather is None else gather)[0] * math.prod(weight[1:])


@register_flop_formula(torch.ops.core_gates.grouped_linear_backward)
def _(grad: Size, _x: Size, weight: Size, *arguments: Any, out_shape: Any) -> int:  # noqa: ARG001
    needs_x, needs_weight = arguments[6:8]
    return int(2 * grad[0] * math.prod(weight[1:]) * (needs_x + needs_weight))


@register_flop_formula(torch.ops.core_gates.grouped_mlp)
def _(x: Size, first: Size, down: Size, *arguments: Any, out_shape: Any) -> int:  # noqa: ARG001
    gather = arguments[3]
    rows = (x if gather is None else gather)[0]
    return 2 * rows * (math.prod(first[1:]) + math.prod(down[1:]))


@register_flop_formula(torch.ops.core_gates.grouped_mlp_backward)
def _(grad: Size, _x: Size, first: Size, down: Size, *arguments: Any, out_shape: Any) -> int:  # noqa: ARG001
    needs_x, needs_first, needs_down, needs_first_bias, _ = arguments[5]
    inner = needs_x or needs_first or needs_first_bias  # the gradient between the two maps
    by_first = math.prod(first[1:]) * (needs_x + needs_first)
    return int(2 * grad[0] * (by_first + math.prod(down[1:]) * (inner + needs_down)))
