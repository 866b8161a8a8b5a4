# %% [markdown]
# # A feed of short videos, ranked for one viewer
# A simulated feed knows the true probability of every reaction. HoME learns from what was shown,
# and a weighted sum of its predictions ranks all videos for a viewer.

# %%
import lightning as L
import polars as pl
import torch

from harness.runs.terminal import quiet_lightning
from recsys import MultiTaskModule, TableDataModule, TableScorer
from video_multitask import FusedScore
from video_multitask.sources.simulated import SimulatedFeed

feed = SimulatedFeed(rows=20_000, days=4, validation_days=1, test_days=1)
data = TableDataModule(feed, batch_size=512)
module = MultiTaskModule("HoME", {"dim": 16, "hidden_dims": [32], "rank": 4}, learning_rate=5e-3)

# %%
quiet_lightning()
L.seed_everything(0, verbose=False)
quiet = {"logger": False, "enable_checkpointing": False, "enable_model_summary": False}
L.Trainer(max_epochs=2, **quiet).fit(module, data)

# %%
test = feed.read().test
of_viewer = ("user_id", "onehot_feat7", "follow_user_num", "tab", "hourmin", "position")
viewer = test[:1].select(of_viewer)
videos = test.unique("video_id", maintain_order=True).drop(of_viewer).join(viewer, how="cross")
scored = TableScorer(module.served(), data.transform).score(videos, [len(videos)])
tasks = feed.read().schema.task_names
fused = FusedScore(tasks, {"long_view": 1.0, "like": 0.5})
best = fused.rank(torch.from_numpy(scored.probabilities), top=5).tolist()
table = pl.DataFrame(scored.probabilities, schema=list(tasks))["long_view", "like", "follow"]
print(table[best].insert_column(0, videos["video_id"][best]))
