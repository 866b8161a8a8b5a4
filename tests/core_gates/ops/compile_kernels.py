"""Compile the element-wise kernels of an op to CUDA code; needs no GPU: compile_kernels.py OP."""

import importlib
import json
import sys

from triton import JITFunction
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.compiler import compile as compile_kernel

kernel = importlib.import_module(f"core_gates.ops.{sys.argv[1]}.kernel")
report = {}
for name, function in vars(kernel).items():
    if not isinstance(function, JITFunction):
        continue
    for dtype in ("fp32", "fp16", "bf16"):
        signature = dict.fromkeys(function.arg_names, f"*{dtype}")
        signature |= {"numel": "i32", "BLOCK": "constexpr"}
        if "gamma" in signature:
            signature["gamma"] = "fp32"
        source = ASTSource(fn=function, signature=signature, constexprs={"BLOCK": 1024})
        compiled = compile_kernel(source, target=GPUTarget("cuda", 80, 32))
        report[f"{name} {dtype}"] = {
            "cubin": len(compiled.asm["cubin"]),
            "ttir": str(compiled.asm["ttir"]),
        }
sys.stdout.write(json.dumps(report))
