"""What encoding adapters may import."""

import subprocess
import sys
from pathlib import Path

import torch

from diffusion.retrieval import LoraWeightEncoder, save_encoder

ROOT = Path(__file__).parents[3]
MODELS = {"diffusers", "peft", "transformers", "accelerate", "scipy"}
LIGHTNING = {"lightning", "torchmetrics", "pytorch_lightning"}
ENCODE = """
import sys
from diffusion.lora_file import load_lora
from diffusion.retrieval import load_encoder
import diffusion.evaluation.retrieval_scores
encoder = load_encoder(sys.argv[1])
encoder.encode(load_lora(sys.argv[2]))
print(*sorted({name.partition(".")[0] for name in sys.modules}))
"""


def loaded(program, *arguments):
    command = [sys.executable, "-c", program, *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_encoding_needs_neither_lightning_nor_libraries_of_models(tmp_path, config, adapter):
    from diffusion.lora_file import save_lora

    torch.manual_seed(0)
    folder = save_encoder(tmp_path / "encoder", LoraWeightEncoder(config()))
    file = save_lora(adapter(0), tmp_path / "a.safetensors", "diffusers")
    names = loaded(ENCODE, folder, tmp_path / "a.safetensors")
    assert "diffusion" in names, file
    assert names & (MODELS | LIGHTNING) == set()


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
