"""What reading, indexing, searching and encoding adapters may import."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from diffusion.lora_file import save_lora
from diffusion.retrieval import LoraWeightEncoder, save_encoder

ROOT = Path(__file__).parents[3]
SAMPLES = ROOT / "tests/golden/autolora/formats"
MODELS = {"diffusers", "peft", "transformers", "accelerate", "scipy"}
LIGHTNING = {"lightning", "torchmetrics", "pytorch_lightning"}
FILES = """
import sys
from diffusion.lora_file import FusedView, load_lora, save_lora, shrink_bundle, verdicts
bundle = load_lora(f"{sys.argv[1]}/kohya_flux_full.safetensors")
FusedView(bundle)["blocks.0.attn.a_to_qkv"]
verdicts(bundle.report)
small, _ = shrink_bundle(bundle, rank=1)
for format in ("diffusers", "kohya", "comfyui"):
    save_lora(small, f"{sys.argv[2]}/{format}.safetensors", format)
save_lora(small, f"{sys.argv[2]}/peft", "peft")
"""
LIBRARY = """
from diffusion.library import LoraLibrary
with LoraLibrary(sys.argv[1], index=f"{sys.argv[2]}/index") as library:
    assert library.scan().kept >= 7
    library.search("style", mode="metadata")
    library.like(library.adapters()[0].name)
"""
ENCODE = """
from diffusion.retrieval import load_encoder
import diffusion.evaluation.retrieval_scores
encoder = load_encoder(f"{sys.argv[2]}/encoder")
encoder.encode(load_lora(f"{sys.argv[2]}/a.safetensors"))
"""
PRINT = """
print(*sorted({name.partition(".")[0] for name in sys.modules}))
"""


@pytest.mark.costly("a new interpreter imports PyTorch")
def test_work_with_files_needs_neither_lightning_nor_libraries_of_models(tmp_path, config, adapter):
    torch.manual_seed(0)
    save_encoder(tmp_path / "encoder", LoraWeightEncoder(config()))
    save_lora(adapter(0), tmp_path / "a.safetensors", "diffusers")
    program = FILES + LIBRARY + ENCODE + PRINT
    command = [sys.executable, "-c", program, str(SAMPLES), str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    names = set(done.stdout.split())
    assert {"torch", "diffusion", "sqlite3"} <= names
    assert names & (MODELS | LIGHTNING) == set()
    written = {"diffusers.safetensors", "kohya.safetensors", "comfyui.safetensors", "peft", "index"}
    assert {path.name for path in tmp_path.iterdir()} == written | {"encoder", "a.safetensors"}


def test_training_imports_no_library_of_models():
    source = [path.read_text() for path in (ROOT / "diffusion/retrieval").glob("*.py")]
    assert not any(f"import {name}" in text or f"from {name}" in text
                   for text in source for name in MODELS)  # fmt: skip
    users = [
        p.stem
        for p in (ROOT / "diffusion/retrieval").glob("*.py")
        if "import lightning" in p.read_text()
    ]
    assert sorted(users) == ["retriever", "retriever_data"]
