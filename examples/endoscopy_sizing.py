# %% [markdown]
# # The size of a polyp from one frame
# Forty polyps are rendered, each with its true size, and sized by the network that ships:
# streams of image, outline and depth, each weighed by feature-selection gates. Research only.

# %%
from endoscopy import gates_of
from endoscopy.bundles.bundle_fitting import shipped_folder
from endoscopy.bundles.sizing_bundle import load_bundle
from endoscopy.evaluation.rendered_frames import predictions_of, rendered_frames
from endoscopy.metrics import object_table
from endoscopy.plots import size_figure
from endoscopy.prediction import predictor_of
from endoscopy.renderer import RendererConfig, render_objects

frames = rendered_frames(render_objects(RendererConfig(seed=11), range(40)))

# %%
bundle = load_bundle(shipped_folder("synthetic", "configured-s0"))
polyps = object_table(predictions_of(predictor_of(bundle), frames))  # median over six frames

# %%
errors = (polyps["predicted_mm"] / polyps["gt"] - 1).abs()
middle = polyps["gt"].median()
constant = (middle / polyps["gt"] - 1).abs()
print(f"mean relative error: network {errors.mean():.2f}, their median {constant.mean():.2f}")
for name, gate in gates_of(bundle.model).items():
    scores = gate.scores()
    print(f"gate {name}: {int((scores > 0.5).sum())} of {scores.numel()} features open")
size_figure(polyps, bundle.conformal).savefig("endoscopy_sizing.png")
