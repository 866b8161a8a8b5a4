# %% [markdown]
# # Do gates select features?
# Eight of 64 inputs matter. A gate on every input is trained with the network, in a stage of its
# own (gradient routing) or jointly, next to a network without gates and the lasso.

# %%
from studies import PlantedTask, planted_features_study, planted_features_table

task = PlantedTask(steps=300, gate_learning_rates=(1e-2,), penalties=(0.3,))
rows = planted_features_study(range(3), task=task)

# %%
table = planted_features_table(rows)  # ranking_auc: do the scores rank the eight first?
shown = ["method", "ranking_auc", "open_informative", "open_rest", "r2"]
print(table[shown].round(2).to_string(index=False))
