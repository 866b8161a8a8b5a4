# %% [markdown]
# # A mixture of experts in a quarter of its memory
# The mixture of bytes that ships writes a text, once whole and then with its experts on disk. An
# expert is read ahead where a gate one layer earlier asks for it; the text is the same.

# %%
from importlib.resources import files

import torch
from transformers import AutoModelForCausalLM

from language import load_offloaded
from language.offload.setup import Setup

folder = files("language") / "weights/experts/weights/decoder-s0"
prompt = torch.tensor([list(b"def mean(values):\n    ")])
whole = AutoModelForCausalLM.from_pretrained(folder).eval()
expected = whole.generate(prompt, max_new_tokens=48, do_sample=False)
print(bytes(expected[0].tolist()).decode())

# %%
print("experts in memory      MB  read for a byte  read ahead  same text")
for budget in (0.2, 0.25, 0.5):
    model = load_offloaded(folder, budget=budget, setup=Setup(predictor="cross-layer"))
    written = model.generate(prompt, max_new_tokens=48, do_sample=False)
    counts, store = model.offload.counts, model.offload.store
    size = len(model.offload.pool.slabs) * store.slab_bytes / 1e6
    print(f"{budget:17.0%} {size:7.2f} {counts.loads / 48:16.1f} {counts.guesses / 48:11.1f}"
          f"  {torch.equal(written, expected)}")  # fmt: skip
    model.offload.close()
