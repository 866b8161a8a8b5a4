import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("compile_kernels.py")


OPS = ("gate_multiply", "silu_gate", "smooth_step")


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    pytest.importorskip("triton")
    environment = {
        "TRITON_INTERPRET": "0",
        "TRITON_DEFAULT_FP_FUSION": "1",
        "TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton")),
    }
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *OPS],
        env=os.environ | environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(params=OPS)
def compiled(request, report):
    return report[request.param]


def test_forward_and_backward_compile_for_cuda_in_every_dtype(compiled):
    assert sorted(compiled) == sorted(
        f"_{direction}_kernel {dtype}"
        for direction in ("forward", "backward")
        for dtype in ("fp32", "fp16", "bf16")
    )
    assert all(entry["cubin"] for entry in compiled.values())


def test_offsets_are_computed_in_64_bits(compiled):
    for name, entry in compiled.items():
        products = re.findall(r"arith\.muli .* : (\S+)", entry["ttir"])
        assert products == ["i64"], name
        assert re.search(r"tt\.addptr .*tensor<1024xi64>", entry["ttir"]), name
