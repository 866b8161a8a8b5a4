"""Compile the kernels of ``gated_lora`` to CUDA code; needs no GPU."""

import json
import sys

from triton import JITFunction
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.compiler import compile as compile_kernel

from core_gates.ops.gated_lora import kernel

SIZES = {"R": 16, "TOKENS": kernel.TOKENS, "FEATURES": kernel.FEATURES}
INTEGERS = ("num_tokens", "dim", "num_adapters", "tokens_of_a_sum")
EXACT = ("mean", "rstd", "base_mean", "base_rstd", "sums", "grad_hidden", "grad_up")

report = {}
for name, function in vars(kernel).items():
    if not isinstance(function, JITFunction) or not name.endswith("_kernel"):
        continue
    for dtype in ("fp32", "fp16", "bf16"):
        signature = dict.fromkeys(function.arg_names, f"*{dtype}")
        signature |= {key: "*fp32" for key in function.arg_names if key in EXACT}
        signature |= {key: "i32" for key in function.arg_names if key in INTEGERS}
        signature |= {"eps": "fp32"} if "eps" in function.arg_names else {}
        constants = {key: value for key, value in SIZES.items() if key in function.arg_names}
        signature |= dict.fromkeys(constants, "constexpr")
        source = ASTSource(fn=function, signature=signature, constexprs=constants)
        compiled = compile_kernel(source, target=GPUTarget("cuda", 80, 32))
        report[f"{name} {dtype}"] = {
            "cubin": len(compiled.asm["cubin"]),
            "shared": compiled.metadata.shared,
            "ttir": str(compiled.asm["ttir"]),
        }
sys.stdout.write(json.dumps(report))
