"""EvoMoE trained on two processes, its blocks whole or sharded: they spawn the same experts."""

import lightning as L
import pytest
import torch
from lightning.pytorch.strategies import ModelParallelStrategy

from language.data import TrainingLoader
from studies.evomoe.budget_training import BudgetModule
from studies.evomoe.methods import METHODS, Sizes, decoder_of, plan_of
from tests.distributed.lightning_fits import fit, rows_of_rank

SIZES = Sizes(updates=16, batch=4, context=16, dim=16, heads=2, layers=2, hidden=24, experts=4)


class Windows(L.LightningDataModule):
    """Half of each batch for each rank."""

    def train_dataloader(self):
        tokens = torch.randint(257, (5000,), generator=torch.Generator().manual_seed(1)).numpy()
        rank, world = rows_of_rank(2)[0], 3 - len(rows_of_rank(2))
        return TrainingLoader(tokens, SIZES.context, SIZES.batch, rank=rank, world=world)

    val_dataloader = train_dataloader


class Spawned(L.Callback):
    """Keeps the experts before and after the update that spawns them."""

    def __init__(self, step):
        self.step, self.found = step, {}

    def on_train_batch_start(self, trainer, module, *args):
        if trainer.global_step in (self.step - 1, self.step):
            weight = module.model.blocks[1].mlp.experts.down_proj
            whole = weight.full_tensor() if hasattr(weight, "full_tensor") else weight
            self.found[trainer.global_step] = whole.detach().clone()


def train(strategy, folder):
    """Return experts around the spawn, and the state at the end with whole tensors."""
    torch.manual_seed(0)
    model = decoder_of("evomoe", SIZES)
    spawned = Spawned(model.blocks[1].mlp.gate.boundaries[0])
    module = BudgetModule(
        model, METHODS["evomoe"], 1e-2, plan_of(SIZES).budget, torch.zeros(1, 17).long(), 3
    )
    given = {"strategy": strategy} if strategy == "ddp" else {
        "strategy": ModelParallelStrategy(2, 1, save_distributed_checkpoint=False)
    }  # fmt: skip
    fit(module, Windows(), folder, callbacks=[spawned], limit_val_batches=0,
        gradient_clip_val=1.0, **given)  # fmt: skip
    state = {n: w.full_tensor() if hasattr(w, "full_tensor") else w
             for n, w in module.state_dict().items()}  # fmt: skip
    return spawned.found, {n: w.detach() for n, w in state.items()}


def train_all(folder):
    return {strategy: train(strategy, folder) for strategy in ("ddp", "fsdp2")}


@pytest.mark.costly("two processes that train twice")
def test_ranks_stay_equal_across_the_spawn(ranks, tmp_path):
    first, second = ranks(train_all, str(tmp_path))
    for strategy in ("ddp", "fsdp2"):
        (spawned, state), (other_spawned, other) = first[strategy], second[strategy]
        before, after = spawned.values()
        both = (after[0] != 0) & (after[1] != 0)
        assert not torch.equal(after[0], after[1])
        assert torch.equal(after[0][both], after[1][both])
        assert not torch.equal(before[0][both], before[1][both])
        assert spawned.keys() == other_spawned.keys()
        assert all(torch.equal(w, other_spawned[n]) for n, w in spawned.items())
        different = [n for n, w in state.items() if not torch.equal(w, other[n])]
        assert not different
        assert float(state["spent"]) / plan_of(SIZES).budget == pytest.approx(1, abs=0.05)
