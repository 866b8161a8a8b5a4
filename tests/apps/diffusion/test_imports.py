"""Verbs on files wait for no library of models."""

import subprocess
import sys
from pathlib import Path

import pytest

from diffusion.lora_file import FluxShape
from diffusion.retrieval import EncoderConfig, LoraWeightEncoder, save_encoder

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
sample, other = sys.argv[1:]
assert main(["diffusion", "inspect", sample, "--json", "a.json"]) == 0
convert = ["diffusion", "convert", sample, "a.safetensors", "--to", "kohya", "--rank", "1"]
assert main(convert) == 0
merge = ["diffusion", "merge", sample, other, "--output", "b.safetensors"]
assert main([*merge, "--method", "ties_svd"]) == 0
assert main(["diffusion", "index", ".", "--encoder", "encoder"]) == 0
assert main(["diffusion", "search", "xlabs", "--mode", "metadata"]) == 0
assert main(["diffusion", "search", "--like", sample]) == 0
print(*sorted({name.partition(".")[0] for name in sys.modules}))
"""


@pytest.mark.costly("six commands in a new interpreter")
def test_no_library_of_models_is_imported(tmp_path):
    shape = FluxShape(num_layers=2, num_single_layers=2, num_heads=2, head_dim=8)
    encoder = LoraWeightEncoder(EncoderConfig(shape))
    save_encoder(tmp_path / "encoder", encoder, text_fingerprint="words")
    program = f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{PROGRAM}"
    done = subprocess.run(
        [sys.executable, "-c", program, SAMPLE, OTHER],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    loaded = set(done.stdout.splitlines()[-1].split())
    assert {"torch", "diffusion"} <= loaded
    assert (loaded & HEAVY, len(list(tmp_path.iterdir()))) == (set(), 5)
