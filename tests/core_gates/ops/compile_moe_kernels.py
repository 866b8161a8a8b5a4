"""Compile the kernels of the expert layer to CUDA code, no GPU needed: ... DTYPE..."""

import json
import sys

from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.compiler import compile as compile_kernel

from core_gates.ops.grouped_linear import kernel as grouped_linear
from core_gates.ops.router import kernel as router

TILE = {"ROWS": 64, "COLUMNS": 64, "DEPTH": 32}
INDICES = ("gather", "scatter", "tile_group", "tile_start", "tile_end", "starts", "ends")
INTEGERS = ("indices", "counts")
FLAGS = {"GATED": True, "KEEP": True, "BIAS": True, "GATHER": True, "SCATTER": True}
KERNELS = {
    "linear": (
        grouped_linear._linear_kernel,
        {"ACTIVATION": "gelu_tanh", "UPCAST": False} | FLAGS | TILE,
        ("x", "weight", "bias", "out", "kept"),
    ),
    "weight_gradient": (
        grouped_linear._weight_gradient_kernel,
        {"GATHER": True, "UPCAST": False} | TILE,
        ("outer", "x", "out"),
    ),
    "router": (
        router._forward_kernel,
        {"K": 2, "RENORMALIZE": True, "ROWS": 16, "COLUMNS": 64},
        ("logits", "weights", "probs", "z_parts"),
    ),
    "router_backward": (
        router._backward_kernel,
        {"K": 2, "RENORMALIZE": True, "ROWS": 16, "COLUMNS": 64},
        ("grad_weights", "grad_probs", "grad_z", "logits", "weights", "out"),
    ),
}


def kind(name, constants, floats, dtype):
    """Type of an argument in the notation of Triton."""
    if name in constants:
        return "constexpr"
    if name in INDICES or name in INTEGERS:
        return "*i64"
    return f"*{dtype}" if name in floats else "i32"


report = {}
for name, (function, constants, floats) in KERNELS.items():
    for dtype in sys.argv[1:]:
        signature = {n: kind(n, constants, floats, dtype) for n in function.arg_names}
        source = ASTSource(fn=function, signature=signature, constexprs=constants)
        compiled = compile_kernel(source, target=GPUTarget("cuda", 80, 32))
        report[f"{name} {dtype}"] = len(compiled.asm["cubin"])
sys.stdout.write(json.dumps(report))
