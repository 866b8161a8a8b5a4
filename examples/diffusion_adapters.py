# %% [markdown]
# # Two adapters in one drawing
# One adapter was trained on mushrooms, one on scanned drawings. Their plain sum asks both for
# all they can give; gates weigh each at every layer and step. The embedded base draws in seconds.

# %%
from importlib.resources import files

import matplotlib.pyplot as plt
from diffusers.utils import logging

from diffusion import AutoLoraPipeline, load_lora
from diffusion.models.embedded_base import EmbeddedBase

logging.disable_progress_bar()
shipped = files("diffusion") / "weights/embedded"
base = EmbeddedBase.load(shipped / "bases/base-s0")
zoo = shipped / "zoos/zoo-s0"
adapters = {name: load_lora(zoo / f"{name}.safetensors") for name in ("mushroom", "scanned")}
draw = AutoLoraPipeline(
    base.pipeline(),
    gates=shipped / "gates/gates-s0/gates.safetensors",
    text=base.encoder(),
    height=base.size,
    width=base.size,
    true_cfg_scale=3.0,
    num_inference_steps=20,
)

# %%
prompt = "a scanned black mushroom on a purple ground"
chosen = {"base alone": {}} | {f"{name} alone": {name: one} for name, one in adapters.items()}
chosen |= {"sum": adapters, "gated": adapters}
figure, places = plt.subplots(1, len(chosen), figsize=(12, 3))
for place, name in zip(places, chosen, strict=True):
    mode = "gated" if name == "gated" else "sum"
    place.imshow(draw(prompt, adapters=chosen[name], mode=mode, seed=3).images[0])
    place.set(title=name, xticks=[], yticks=[])
figure.suptitle(prompt)
figure.savefig("diffusion_adapters.png")
