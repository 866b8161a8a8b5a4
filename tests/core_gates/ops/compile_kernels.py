"""Compile kernels to CUDA code of compute capability 8.0; needs no GPU.

``python compile_kernels.py '[["ranking", "bf16"], ...]'`` writes a list of what each group of
kernels gives: by kernel, the bytes of its code, the bytes of memory it shares, and its IR.
"""

import json
import sys

from triton import JITFunction
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.compiler import compile as compile_kernel

from core_gates.ops.block_max_attention import kernel as block_max
from core_gates.ops.block_sparse_attention import kernel as block_sparse
from core_gates.ops.feature_gate import kernel as feature_gate
from core_gates.ops.gated_lora import kernel as gated_lora
from core_gates.ops.gated_lora.op import LARGEST_KERNEL_RANK
from core_gates.ops.norm_act import kernel as norm_act
from core_gates.ops.router import kernel as router

VALUES = "*"
"""Type of pointers to values of the dtype that is asked for."""
ATTENTION = {"CAUSAL": True, "UPCAST": False, "PER_ROW": False, "SIZE": 16, "BLOCK": 16, "DIM": 32}
LORA = {"R": 16, "TOKENS": gated_lora.TOKENS, "FEATURES": gated_lora.FEATURES}
ROUTER = {"K": 2, "RENORMALIZE": True, "ROWS": 16, "COLUMNS": 64}
NORM = {"ROWS": 32, "CHANNELS": 64}
GATE = {"UPCAST": False, "RANK": 32, "ROWS": 64, "COLUMNS": 64}


def kernels_of(module, constants):
    """All kernels of a module, by its name and theirs, with their constants."""
    return {
        f"{module.__name__.split('.')[2]} {name}": (function, constants)
        for name, function in vars(module).items()
        if isinstance(function, JITFunction) and name.endswith("_kernel")
    }


def typed(default, **names):
    """``default`` for arguments that no type names; each type has its names in a string."""
    return default, {n: kind for kind, some in names.items() for n in some.split()}


OF_ATTENTION = typed(
    VALUES,
    i32="num_queries num_keys dim rows columns heads group offset lead length num_blocks",
    fp32="scale",
    **{"*u8": "padding", "*i32": "lists counts", "*fp32": "lse inner maxima"},
)
OF_LORA = typed(
    VALUES,
    i32="num_tokens dim num_adapters tokens_of_a_sum",
    fp32="eps",
    **{"*fp32": "mean rstd base_mean base_rstd sums grad_hidden grad_up grad_coefficients"},
)
OF_EXPERTS = typed(
    "i32",
    **{
        "*i64": "gather scatter tile_group tile_start tile_end starts ends indices counts",
        VALUES: "x weight bias out kept outer logits weights probs z_parts "
        "grad_weights grad_probs grad_z",
    },
)
OF_RANKING = typed(
    "i32",
    **{
        "*i64": "inputs gates",
        "*fp32": "sums scale shift affine factors mixture of_v of_hidden of_mixture",
        VALUES: "x out grad v hidden up",
    },
)
GROUPS = {
    "attention": (
        kernels_of(block_sparse, ATTENTION) | kernels_of(block_max, ATTENTION),
        *OF_ATTENTION,
    ),
    "gated_lora": (kernels_of(gated_lora, LORA), *OF_LORA),
    # Triton makes a constant of an argument that is one.
    "gated_lora, one adapter, one token": (
        kernels_of(gated_lora, LORA | {"num_tokens": 1, "num_adapters": 1}),
        *OF_LORA,
    ),
    "gated_lora, largest rank": (
        kernels_of(gated_lora, LORA | {"R": LARGEST_KERNEL_RANK}),
        *OF_LORA,
    ),
    "experts": (
        {
            "router": (router._forward_kernel, ROUTER),
            "router_backward": (router._backward_kernel, ROUTER),
        },
        *OF_EXPERTS,
    ),
    "ranking": (
        {
            "moments": (norm_act._moments_kernel, NORM),
            "apply": (norm_act._apply_kernel, NORM | {"ACTIVATION": "gelu_tanh"}),
            "sums": (norm_act._sums_kernel, NORM | {"ACTIVATION": "gelu"}),
            "gradient": (norm_act._gradient_kernel, NORM | {"ACTIVATION": "silu"}),
            "forward": (feature_gate._forward_kernel, GATE),
            "rows": (feature_gate._rows_kernel, GATE),
            "up": (feature_gate._up_kernel, GATE),
        },
        *OF_RANKING,
    ),
}

reports = []
for group, *dtypes in json.loads(sys.argv[1]):
    kernels, default, types = GROUPS[group]
    report = {}
    for name, (function, given) in kernels.items():
        constants = {n: value for n, value in given.items() if n in function.arg_names}
        kinds = {n: types.get(n, default) for n in function.arg_names}
        kinds |= dict.fromkeys(constants, "constexpr")
        for dtype in dtypes:
            signature = {n: f"*{dtype}" if kind == VALUES else kind for n, kind in kinds.items()}
            source = ASTSource(fn=function, signature=signature, constexprs=constants)
            compiled = compile_kernel(source, target=GPUTarget("cuda", 80, 32))
            report[f"{name} {dtype}"] = {
                "cubin": len(compiled.asm["cubin"]),
                "shared": compiled.metadata.shared,
                "ttir": str(compiled.asm["ttir"]),
            }
    reports.append(report)
sys.stdout.write(json.dumps(reports))
