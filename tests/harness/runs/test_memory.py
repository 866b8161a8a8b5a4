import os
import subprocess
import sys

import pytest

SCRIPT = """
import resource
import torch
from harness.runs.memory import keep_freed_memory

kept = keep_freed_memory()
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        torch.ones(2**24)  # 64 MiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults()
print(kept, faults())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="settings of glibc")
@pytest.mark.parametrize("own", [{}, {"MALLOC_ARENA_MAX": "2"}])
def test_large_buffers_come_back_without_page_faults(own):
    environment = {k: v for k, v in os.environ.items() if not k.startswith("MALLOC_")} | own
    command = [sys.executable, "-c", SCRIPT]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    kept, faults = done.stdout.split()
    assert (kept == "True") == (not own)
    assert (int(faults) < 100) == (not own)
