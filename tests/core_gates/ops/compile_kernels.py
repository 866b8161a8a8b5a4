"""Compile the element-wise kernels of ops to CUDA code; needs no GPU: compile_kernels.py OP …."""

import importlib
import json
import sys

from triton import JITFunction
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.compiler import compile as compile_kernel

kernels = {op: importlib.import_module(f"core_gates.ops.{op}.kernel") for op in sys.argv[1:]}
functions = [(op, *found) for op, kernel in kernels.items() for found in vars(kernel).items()]
report = {op: {} for op in kernels}
for op, name, function in functions:
    if not isinstance(function, JITFunction):
        continue
    for dtype in ("fp32", "fp16", "bf16"):
        signature = dict.fromkeys(function.arg_names, f"*{dtype}")
        signature |= {"numel": "i32", "BLOCK": "constexpr"}
        if "gamma" in signature:
            signature["gamma"] = "fp32"
        source = ASTSource(fn=function, signature=signature, constexprs={"BLOCK": 1024})
        compiled = compile_kernel(source, target=GPUTarget("cuda", 80, 32))
        report[op][f"{name} {dtype}"] = {
            "cubin": len(compiled.asm["cubin"]),
            "ttir": str(compiled.asm["ttir"]),
        }
sys.stdout.write(json.dumps(report))
