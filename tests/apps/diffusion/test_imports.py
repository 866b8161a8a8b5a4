"""Verbs on files wait for no library of models."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
SAMPLE = str(ROOT / "tests" / "golden" / "autolora" / "formats" / "xlabs.safetensors")
OTHER = str(ROOT / "tests" / "golden" / "autolora" / "formats" / "kohya_flux_full.safetensors")
HEAVY = {
    "diffusers", "peft", "transformers", "lightning", "torchmetrics", "accelerate", "gradio",
    "scipy", "matplotlib", "pandas",
}  # fmt: skip
PROGRAM = """
import sys
from apps.main import main
assert main(["diffusion", *sys.argv[1:]]) == 0
print(*sorted({name.partition(".")[0] for name in sys.modules}))
"""


@pytest.mark.parametrize(
    "words",
    [
        ["inspect", SAMPLE, "--json", "a.json"],
        ["convert", SAMPLE, "a.safetensors", "--to", "kohya", "--rank", "1"],
        ["merge", SAMPLE, OTHER, "--output", "b.safetensors", "--method", "ties_svd"],
    ],
    ids=lambda words: words[0],
)
def test_no_library_of_models_is_imported(words, tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{PROGRAM}", *words],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    loaded = set(done.stdout.splitlines()[-1].split())
    assert {"torch", "diffusion"} <= loaded
    assert loaded & HEAVY == set()
    assert len(list(tmp_path.iterdir())) == 1
