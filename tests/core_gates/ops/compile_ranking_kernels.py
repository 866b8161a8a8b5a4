"""Compile the kernels of ranking networks to CUDA code, no GPU needed: ... DTYPE..."""

import json
import sys

from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.compiler import compile as compile_kernel

from core_gates.ops.feature_gate import kernel as feature_gate
from core_gates.ops.norm_act import kernel as norm_act

NORM = {"ROWS": 32, "CHANNELS": 64}
GATE = {"UPCAST": False, "RANK": 32, "ROWS": 64, "COLUMNS": 64}
FLOATS = ("sums", "scale", "shift", "affine", "factors", "mixture")
FLOATS += ("of_v", "of_hidden", "of_mixture")  # which stay in float32
VALUES = ("x", "out", "grad", "v", "hidden", "up")
KERNELS = {
    "moments": (norm_act._moments_kernel, NORM),
    "apply": (norm_act._apply_kernel, NORM | {"ACTIVATION": "gelu_tanh"}),
    "sums": (norm_act._sums_kernel, NORM | {"ACTIVATION": "gelu"}),
    "gradient": (norm_act._gradient_kernel, NORM | {"ACTIVATION": "silu"}),
    "forward": (feature_gate._forward_kernel, GATE),
    "rows": (feature_gate._rows_kernel, GATE),
    "up": (feature_gate._up_kernel, GATE),
}


def kind(name, constants, dtype):
    """Type of an argument in the notation of Triton."""
    if name in constants:
        return "constexpr"
    if name in ("inputs", "gates"):
        return "*i64"
    if name in FLOATS:
        return "*fp32"
    return f"*{dtype}" if name in VALUES else "i32"


report = {}
for name, (function, constants) in KERNELS.items():
    for dtype in sys.argv[1:]:
        signature = {n: kind(n, constants, dtype) for n in function.arg_names}
        source = ASTSource(fn=function, signature=signature, constexprs=constants)
        compiled = compile_kernel(source, target=GPUTarget("cuda", 80, 32))
        report[f"{name} {dtype}"] = len(compiled.asm["cubin"])
sys.stdout.write(json.dumps(report))
