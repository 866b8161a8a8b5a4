"""Peak memory of a mixture model of 400 MB under a quarter of its experts, in fresh processes.

Growth is counted from where all code is imported, which is 200 MB that both ways need.
"""

import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen3MoeConfig

GROWTH = """
import sys
import accelerate
import torch
from transformers import AutoModelForCausalLM, GenerationConfig
from transformers.models.qwen3_moe import modeling_qwen3_moe
from language.offload.loading import load_offloaded
def kilobytes(name):
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name))
how, folder = sys.argv[1:]
before = kilobytes("VmRSS")
if how == "stock":
    model = AutoModelForCausalLM.from_pretrained(folder, experts_implementation="eager")
else:
    model = load_offloaded(folder, budget=0.25)
prompt = torch.arange(48)[None]
tokens = model.generate(prompt, max_new_tokens=16, do_sample=False)
print(kilobytes("VmHWM") - before, tokens.sum().item())
"""
SIZES = {
    **{"vocab_size": 512, "hidden_size": 512, "head_dim": 64, "num_hidden_layers": 8},
    **{"num_attention_heads": 8, "num_key_value_heads": 2, "num_experts": 32},
    **{"num_experts_per_tok": 2, "moe_intermediate_size": 256},
}


def growth(how, folder):
    command = [sys.executable, "-c", GROWTH, how, str(folder)]
    out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return map(int, out.split())


@pytest.mark.slow
def test_peak_memory(tmp_path):
    config = Qwen3MoeConfig(**SIZES, **dict.fromkeys(("bos_token_id", "eos_token_id")))
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    assert 390e6 < 4 * sum(one.numel() for one in model.parameters()) < 450e6
    for name, fused in {"fused": True, "single": False}.items():
        model.save_pretrained(tmp_path / name, save_original_format=not fused)
    del model
    stock, tokens = growth("stock", tmp_path / "fused")
    for name, bar in {"fused": 0.45, "single": 0.25}.items():
        whole, _ = growth("stock", tmp_path / name) if name == "single" else (stock, tokens)
        found, same = growth("offloaded", tmp_path / name)
        assert same == tokens
        sys.stdout.write(f"{name}: {found / 1e3:,.0f} of {whole / 1e3:,.0f} MB\n")
        assert found / whole <= bar, f"{name}: {found} of {whole} kB"
