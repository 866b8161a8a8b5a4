import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("compile_gated_lora.py")
KERNELS = ("base_statistics", "forward", "row_sums", "grad_base", "shared_grads")
CASES = [
    "bf16",
    *(
        pytest.param(case, marks=pytest.mark.slow)
        for case in ("one adapter, one token", "largest rank")
    ),
]
SHARED_MEMORY = 163 * 1024  # bytes a block may use on compute capability 8.0


@pytest.fixture(scope="module", params=CASES)
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
    found = json.loads(done.stdout)
    assert sorted(found) == sorted(f"_{name}_kernel, {request.param}" for name in KERNELS)
    return found


def test_every_kernel_compiles_for_cuda(compiled):
    assert all(entry["cubin"] for entry in compiled.values())


def test_tiles_fit_into_the_shared_memory_of_a_multiprocessor(compiled):
    shared = {name: entry["shared"] for name, entry in compiled.items()}
    assert max(shared.values()) <= SHARED_MEMORY, shared


def test_rows_are_addressed_in_64_bits(compiled):
    for name, entry in compiled.items():
        offsets = re.findall(r"tt\.addptr .*, tensor<32x1x(i\d+)>", entry["ttir"])
        assert offsets, name
        assert set(offsets) == {"i64"}, name
