# %% [markdown]
# # A ranker for your own table
# A table of visits to a bookshop becomes a multi-task ranker (HoME) that scores new rows.

# %%
import lightning as L
import numpy as np
import polars as pl

from harness.runs.terminal import quiet_lightning
from recsys import MultiTaskModule, OwnTable, TableDataModule, TableScorer
from recsys.metrics import gauc

draw = np.random.default_rng(0)
reader, book = draw.integers(300, size=12_000), draw.integers(400, size=12_000)
liking = 2.0 * (reader % 5 == book % 5) + draw.normal(size=400)[book] - 1
clicked = draw.random(12_000) < 1 / (1 + np.exp(-liking))
bought = clicked & (draw.random(12_000) < 1 / (1 + np.exp(2 - liking)))
columns = {"day": np.arange(12_000) // 1000, "reader": reader, "book": book}
columns |= {"genre": book % 5, "taste": reader % 5, "clicked": clicked, "bought": bought}
pl.DataFrame(columns).write_csv("visits.csv")

# %%
quiet_lightning()
L.seed_everything(0, verbose=False)
tasks = {"clicked": "look", "bought": "act"}
table = OwnTable("visits.csv", tasks, user="reader", item="book", time="day")
data = TableDataModule(table, batch_size=256)
module = MultiTaskModule("HoME", {"dim": 16, "hidden_dims": [32], "rank": 4}, learning_rate=1e-2)
quiet = {"logger": False, "enable_checkpointing": False, "enable_model_summary": False}
L.Trainer(max_epochs=4, **quiet).fit(module, data)

# %%
held_out = pl.read_csv("visits.csv").filter(pl.col("day") >= 11)
scores = TableScorer(module.served(), data.transform).score(held_out).probabilities
popular = np.array([clicked[:10_000][book[:10_000] == one].mean() for one in range(400)])
for place, task in enumerate(tasks):
    ours = gauc(scores[:, place], held_out[task], held_out["reader"]).mean
    simple = gauc(popular[held_out["book"]], held_out[task], held_out["reader"]).mean
    print(f"{task}: AUC within a reader {ours:.3f}, by popularity {simple:.3f}")
