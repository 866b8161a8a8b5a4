import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("compile_moe_kernels.py")


@pytest.mark.costly("Triton compiles for CUDA in a new process")
@pytest.mark.parametrize(
    "dtypes", [["bf16"], pytest.param(["fp32", "fp16"], marks=pytest.mark.slow)], ids=str
)
def test_kernels_compile_for_cuda(dtypes, tmp_path):
    pytest.importorskip("triton")
    environment = {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *dtypes],
        env=os.environ | environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    sizes = json.loads(done.stdout)
    names = ("linear", "weight_gradient", "router", "router_backward")
    assert set(sizes) == {f"{n} {d}" for n in names for d in dtypes}
    assert all(sizes.values())
