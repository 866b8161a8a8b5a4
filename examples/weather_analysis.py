# %% [markdown]
# # One analysis of the atmosphere
# A background twelve hours old and noisy observations at one grid point in ten become an analysis:
# by optimal interpolation, and by the gated network that was trained on the day before.

# %%
from importlib.resources import files

from weather import OptimalInterpolation, read_analysis
from weather.baselines.covariance import HomogeneousCovariance
from weather.experiments.ensemble.ensemble_sample import EnsembleTask
from weather.experiments.ensemble.source import Era5EnsembleSource
from weather.plots import analysis_figure

sample = Era5EnsembleSource()  # ten members of ERA5, 1 and 2 January 2017
task = EnsembleTask("persistence", 0.1)
case = sample.cases("persistence")[-1]  # another member is the truth
situation = sample.situation(task, case)

# %%
errors = sample.errors("persistence")  # of backgrounds, on the day before
covariance = HomogeneousCovariance.from_samples(errors, sample.grid, length_km=800.0)
weights = files("weather") / "weights/era5_ensemble/weights/adas_increment-s0/weights.safetensors"
network = read_analysis(weights).expecting(sample.task_background_sd["persistence"])
analyses = {
    "background": case.background,
    "optimal interpolation": situation.analyze(OptimalInterpolation(covariance)),
    "gated network": situation.analyze(network),
}

# %%
print(f"{'RMSE':>22}", *(f"{label:>10}" for label in sample.channels.labels))
for name, fields in analyses.items():
    rmse = sample.grid.area_mean((fields - case.truth).square()).sqrt()
    print(f"{name:>22}", *(f"{value:10.2f}" for value in rmse.tolist()))
z500 = sample.channels.index("geopotential", 500)
analysis_figure(
    *(fields[z500] for fields in (case.truth, case.background, analyses["gated network"])),
    sample.grid, variable="geopotential", level=500,
).savefig("weather_analysis.png")  # fmt: skip
