"""What indexing and searching may import."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[3]
HEAVY = {"diffusers", "peft", "transformers", "lightning", "torchmetrics", "accelerate", "scipy"}
PROGRAM = """
import sys
from diffusion.library import LoraLibrary
with LoraLibrary(sys.argv[1], index=sys.argv[2]) as library:
    assert library.scan().kept >= 7
    library.search("style", mode="metadata")
    library.like(library.adapters()[0].name)
print(*sorted({name.partition(".")[0] for name in sys.modules}))
"""


def test_no_library_of_models_is_imported(tmp_path):
    samples = ROOT / "tests/golden/autolora/formats"
    command = [sys.executable, "-c", PROGRAM, str(samples), str(tmp_path / "index")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    assert {"torch", "diffusion", "sqlite3"} <= loaded
    assert loaded & HEAVY == set()
