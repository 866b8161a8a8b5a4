"""Every Triton kernel compiles to CUDA code, without a GPU."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
SCRIPT = Path(__file__).with_name("compile_kernels.py")
SHARED_MEMORY = 163 * 1024  # bytes a block may use on compute capability 8.0
CALLS = [
    ("attention", "bf16"),
    ("attention", "fp32"),
    ("gated_lora", "bf16"),
    ("gated_lora, one adapter, one token", "bf16"),
    ("gated_lora, largest rank", "fp32"),
    ("experts", "bf16", "fp32", "fp16"),
    ("ranking", "bf16", "fp32", "fp16"),
]
LORA = {
    f"gated_lora _{name}_kernel"
    for name in ("base_statistics", "forward", "row_sums", "grad_base", "shared_grads")
}
NAMES = {
    "attention": {
        "block_sparse_attention _forward_kernel",
        "block_sparse_attention _query_gradient_kernel",
        "block_sparse_attention _key_gradient_kernel",
        "block_max_attention _forward_kernel",
    },
    "gated_lora": LORA,
    "gated_lora, one adapter, one token": LORA,
    "gated_lora, largest rank": LORA,
    "experts": {"router", "router_backward"},
    "ranking": {"moments", "apply", "sums", "gradient", "forward", "rows", "up"},
}


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    """What a process reports that imports Triton once, by group and dtypes."""
    pytest.importorskip("triton")
    environment = {
        "TRITON_INTERPRET": "0",
        "TRITON_DEFAULT_FP_FUSION": "1",
        "TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton")),
    }
    done = subprocess.run(
        [sys.executable, str(SCRIPT), json.dumps(CALLS)],
        env=os.environ | environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return dict(zip(CALLS, json.loads(done.stdout), strict=True))


@pytest.mark.parametrize("call", CALLS, ids=", ".join)
def test_kernels_compile_and_fit_into_the_shared_memory(call, reports):
    group, *dtypes = call
    assert reports[call].keys() == {f"{n} {dtype}" for n in NAMES[group] for dtype in dtypes}
    for name, entry in reports[call].items():
        assert entry["cubin"], name
        assert entry["shared"] <= SHARED_MEMORY, name


@pytest.mark.parametrize("call", CALLS[:5], ids=", ".join)
def test_rows_are_addressed_in_64_bits(call, reports):
    product = r"arith\.muli .* : tensor<16x1x(\w+)>"
    pattern = product if call[0] == "attention" else r"tt\.addptr .*, tensor<32x1x(i\d+)>"
    for name, entry in reports[call].items():
        assert set(re.findall(pattern, entry["ttir"])) == {"i64"}, name
