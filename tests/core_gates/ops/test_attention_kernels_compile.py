import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("compile_attention_kernels.py")


@pytest.fixture(scope="module", params=["bf16", pytest.param("fp32", marks=pytest.mark.slow)])
def compiled(request, tmp_path_factory):
    pytest.importorskip("triton")
    environment = {
        "TRITON_INTERPRET": "0",
        "TRITON_DEFAULT_FP_FUSION": "1",
        "TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton")),
    }
    done = subprocess.run(
        [sys.executable, str(SCRIPT), request.param],
        env=os.environ | environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_every_kernel_compiles_for_cuda(compiled):
    (dtype,) = {name.rpartition(" ")[2] for name in compiled}
    kernels = [
        "block_sparse_attention _forward_kernel",
        "block_sparse_attention _query_gradient_kernel",
        "block_sparse_attention _key_gradient_kernel",
        "block_max_attention _forward_kernel",
    ]
    assert sorted(compiled) == sorted(f"{k} {dtype}" for k in kernels)
    assert all(entry["cubin"] for entry in compiled.values())


def test_offsets_of_tokens_are_computed_in_64_bits(compiled):
    for name, entry in compiled.items():
        products = re.findall(r"arith\.muli .* : tensor<16x1x(\w+)>", entry["ttir"])
        assert products, name
        assert set(products) == {"i64"}, name
