import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("compile_gated_lora.py")
KERNELS = ("base_statistics", "forward", "row_sums", "grad_base", "shared_grads")


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    pytest.importorskip("triton")
    environment = {
        "TRITON_INTERPRET": "0",
        "TRITON_DEFAULT_FP_FUSION": "1",
        "TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton")),
    }
    done = subprocess.run(
        [sys.executable, str(SCRIPT)], env=os.environ | environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_every_kernel_compiles_for_cuda_in_every_dtype(compiled):
    assert sorted(compiled) == sorted(
        f"_{name}_kernel {dtype}" for name in KERNELS for dtype in ("fp32", "fp16", "bf16")
    )
    assert all(entry["cubin"] for entry in compiled.values())


def test_tiles_fit_into_the_shared_memory_of_a_multiprocessor(compiled):
    assert max(entry["shared"] for entry in compiled.values()) <= 160 * 1024


def test_offsets_of_tokens_are_computed_in_64_bits(compiled):
    for name, entry in compiled.items():
        assert re.search(r"tt\.addptr .*tensor<64x128xi64>", entry["ttir"]), name
