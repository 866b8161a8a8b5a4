"""Compile the kernels of ``gated_lora`` to CUDA code; needs no GPU: compile_gated_lora.py CASE."""

import json
import sys

from triton import JITFunction
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.compiler import compile as compile_kernel

from core_gates.ops.gated_lora import kernel
from core_gates.ops.gated_lora.op import LARGEST_KERNEL_RANK

SIZES = {"R": 16, "TOKENS": kernel.TOKENS, "FEATURES": kernel.FEATURES}
INTEGERS = ("num_tokens", "dim", "num_adapters", "tokens_of_a_sum")
EXACT = (
    "mean",
    "rstd",
    "base_mean",
    "base_rstd",
    "sums",
    "grad_hidden",
    "grad_up",
    "grad_coefficients",
)

# Triton makes a constant of an argument that is one.
CASES = {
    "bf16": ("bf16", {}),
    "one adapter, one token": ("bf16", {"num_tokens": 1, "num_adapters": 1}),
    "largest rank": ("fp32", {"R": LARGEST_KERNEL_RANK}),
}

report = {}
for name, function in vars(kernel).items():
    if not isinstance(function, JITFunction) or not name.endswith("_kernel"):
        continue
    for case in sys.argv[1:]:
        dtype, fixed = CASES[case]
        names = function.arg_names
        signature = dict.fromkeys(names, f"*{dtype}")
        signature |= {key: "*fp32" for key in names if key in EXACT}
        signature |= {key: "i32" for key in names if key in INTEGERS}
        signature |= {"eps": "fp32"} if "eps" in names else {}
        constants = {key: value for key, value in (SIZES | fixed).items() if key in names}
        signature |= dict.fromkeys(constants, "constexpr")
        source = ASTSource(fn=function, signature=signature, constexprs=constants)
        compiled = compile_kernel(source, target=GPUTarget("cuda", 80, 32))
        report[f"{name}, {case}"] = {
            "cubin": len(compiled.asm["cubin"]),
            "shared": compiled.metadata.shared,
            "ttir": str(compiled.asm["ttir"]),
        }
sys.stdout.write(json.dumps(report))
