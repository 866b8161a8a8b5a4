"""Compile the kernels of block attention to CUDA code of a DTYPE; needs no GPU."""

import json
import sys

from triton import JITFunction
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.compiler import compile as compile_kernel

from core_gates.ops.block_max_attention import kernel as block_max
from core_gates.ops.block_sparse_attention import kernel as block_sparse

FLOAT32 = {"lse", "inner", "maxima"}
INT32 = {"lists", "counts"}
INTEGERS = {
    "num_queries", "num_keys", "dim", "rows", "columns", "heads", "group", "offset", "lead",
    "length", "num_blocks",
}  # fmt: skip
CONSTANTS = {"CAUSAL": True, "UPCAST": False, "PER_ROW": False, "SIZE": 16, "BLOCK": 16, "DIM": 32}


def kind(name, dtype):
    if name in CONSTANTS:
        return "constexpr"
    if name in INTEGERS:
        return "i32"
    if name == "scale":
        return "fp32"
    if name == "padding":
        return "*u8"
    return "*i32" if name in INT32 else "*fp32" if name in FLOAT32 else f"*{dtype}"


report = {}
for module in (block_sparse, block_max):
    for name, function in vars(module).items():
        if not isinstance(function, JITFunction) or not name.endswith("_kernel"):
            continue
        for dtype in sys.argv[1:]:
            signature = {argument: kind(argument, dtype) for argument in function.arg_names}
            constants = {k: v for k, v in CONSTANTS.items() if k in signature}
            source = ASTSource(fn=function, signature=signature, constexprs=constants)
            compiled = compile_kernel(source, target=GPUTarget("cuda", 80, 32))
            report[f"{module.__name__.split('.')[2]} {name} {dtype}"] = {
                "cubin": len(compiled.asm["cubin"]),
                "ttir": str(compiled.asm["ttir"]),
            }
sys.stdout.write(json.dumps(report))
