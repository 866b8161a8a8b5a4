"""What reading, converting and inspecting files may import."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[3]
HEAVY = {"diffusers", "peft", "transformers", "lightning", "torchmetrics", "accelerate", "scipy"}
PROGRAM = """
import sys
from diffusion.lora_file import FusedView, load_lora, save_lora, shrink_bundle, verdicts
bundle = load_lora(sys.argv[1])
FusedView(bundle)["blocks.0.attn.a_to_qkv"]
verdicts(bundle.report)
small, _ = shrink_bundle(bundle, rank=1)
for format in ("diffusers", "kohya", "comfyui"):
    save_lora(small, f"{sys.argv[2]}/{format}.safetensors", format)
save_lora(small, f"{sys.argv[2]}/peft", "peft")
print(*sorted({name.partition(".")[0] for name in sys.modules}))
"""


def test_no_library_of_models_is_imported(tmp_path):
    sample = ROOT / "tests/golden/autolora/formats/kohya_flux_full.safetensors"
    command = [sys.executable, "-c", PROGRAM, str(sample), str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    assert {"torch", "diffusion"} <= loaded
    assert loaded & HEAVY == set()
    assert len(list(tmp_path.iterdir())) == 4
