"""Every Triton kernel compiles to CUDA code, without a GPU."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
SCRIPT = Path(__file__).with_name("compile_all.py")
ATTENTION, LORA = "compile_attention_kernels.py", "compile_gated_lora.py"
MOE, RANKING = "compile_moe_kernels.py", "compile_ranking_kernels.py"
COMMON = tuple((script, "bf16") for script in (ATTENTION, LORA, MOE, RANKING))
SHARED_MEMORY = 163 * 1024  # bytes a block may use on compute capability 8.0


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """``compiled(script, *words)``: what it reports; a single process runs all of COMMON."""
    pytest.importorskip("triton")
    environment = {
        "TRITON_INTERPRET": "0",
        "TRITON_DEFAULT_FP_FUSION": "1",
        "TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton")),
    }
    found = {}

    def report(*call):
        if call not in found:
            calls = COMMON if call in COMMON else (call,)
            done = subprocess.run(
                [sys.executable, str(SCRIPT), json.dumps(calls)],
                env=os.environ | environment,
                capture_output=True,
                text=True,
            )
            assert done.returncode == 0, done.stderr
            found.update(zip(calls, json.loads(done.stdout), strict=True))
        return found[call]

    return report


@pytest.fixture(scope="module", params=[("bf16",), ("fp32",)], ids=str)
def attention(request, compiled):
    return compiled(ATTENTION, *request.param)


def test_kernels_of_block_attention_compile(attention):
    (dtype,) = {name.rpartition(" ")[2] for name in attention}
    kernels = [
        "block_sparse_attention _forward_kernel",
        "block_sparse_attention _query_gradient_kernel",
        "block_sparse_attention _key_gradient_kernel",
        "block_max_attention _forward_kernel",
    ]
    assert sorted(attention) == sorted(f"{k} {dtype}" for k in kernels)
    assert all(entry["cubin"] for entry in attention.values())


def test_offsets_of_tokens_are_computed_in_64_bits(attention):
    for name, entry in attention.items():
        products = re.findall(r"arith\.muli .* : tensor<16x1x(\w+)>", entry["ttir"])
        assert products, name
        assert set(products) == {"i64"}, name


@pytest.fixture(
    scope="module", params=[("bf16",), ("one adapter, one token",), ("largest rank",)], ids=str
)
def gated_lora(request, compiled):
    found = compiled(LORA, *request.param)
    names = ("base_statistics", "forward", "row_sums", "grad_base", "shared_grads")
    assert sorted(found) == sorted(f"_{name}_kernel, {request.param[0]}" for name in names)
    return found


def test_kernels_of_gated_lora_compile(gated_lora):
    assert all(entry["cubin"] for entry in gated_lora.values())


def test_tiles_fit_into_the_shared_memory_of_a_multiprocessor(gated_lora):
    shared = {name: entry["shared"] for name, entry in gated_lora.items()}
    assert max(shared.values()) <= SHARED_MEMORY, shared


def test_rows_are_addressed_in_64_bits(gated_lora):
    for name, entry in gated_lora.items():
        offsets = re.findall(r"tt\.addptr .*, tensor<32x1x(i\d+)>", entry["ttir"])
        assert offsets, name
        assert set(offsets) == {"i64"}, name


@pytest.fixture(scope="module", params=[("bf16",), ("fp32", "fp16")], ids=str)
def dtypes(request):
    return request.param


@pytest.fixture(scope="module")
def sizes(dtypes, compiled):
    return {script: compiled(script, *dtypes) for script in (MOE, RANKING)}


@pytest.mark.parametrize(
    ("script", "names"),
    [
        (MOE, ("linear", "weight_gradient", "router", "router_backward")),
        (RANKING, ("moments", "apply", "sums", "gradient", "forward", "rows", "up")),
    ],
)
def test_kernels_of_experts_and_of_ranking_compile(script, names, dtypes, sizes):
    assert set(sizes[script]) == {f"{name} {dtype}" for name in names for dtype in dtypes}
    assert all(sizes[script].values())
