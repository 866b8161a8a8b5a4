"""A decoder trained on two processes, its blocks whole or sharded, against one process."""

from functools import partial

import lightning as L
import pytest
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed import all_reduce, is_initialized
from torch.testing import assert_close
from torch.utils.data import DataLoader

from core_gates import StackedExperts, TopKGate
from language.decoder import Decoder
from language.module import LanguageModule
from tests.distributed.lightning_fits import fit, validation_scores

STEPS = 10
KINDS = {
    "dense": {"tie_embeddings": True},
    "top-k": {
        "checkpointing": True,
        "gate": partial(TopKGate, num_experts=4, k=2),
        "experts": partial(StackedExperts, hidden_dim=8),
    },
}
CLIPPED = {"gradient_clip_val": 1.0}
LOSSES = {"dense": {}, "top-k": {"balance": 0.1, "z": 0.01}}


class Watch(L.Callback):
    """Gather the cross-entropy of every step."""

    def __init__(self):
        self.losses = []

    def on_train_batch_end(self, trainer, module, outputs, batch, index):
        self.losses.append(trainer.callback_metrics["train/loss"].double())


def module_of(kind):
    torch.manual_seed(0)
    sizes = {"hidden_dim": 24, "context": 12, "dtype": torch.float64, "qk_norm": True}
    model = Decoder(29, 16, 2, 4, 2, **sizes, **KINDS[kind])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2).add_(parameter.ndim == 1)
    return LanguageModule(model, 1e-2, warmup_steps=3, losses=LOSSES[kind])


class Tokens(L.LightningDataModule):
    """Ten batches, of which a rank gets its part; also for validation."""

    def __init__(self, share=lambda batch: batch):
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        whole = [torch.randint(29, (8, 13), generator=generator) for _ in range(STEPS)]
        self.batches = [share(batch) for batch in whole]

    def train_dataloader(self):
        return DataLoader(self.batches, batch_size=None)

    def val_dataloader(self):
        return DataLoader(self.batches[:2], batch_size=None)


def train(parallel, strategy, kind, folder):
    """Train for ten steps; return the state, and the losses, of which ranks have the mean."""
    module, watch, options = module_of(kind), Watch(), {}
    if is_initialized() and strategy == "fsdp2":
        options["strategy"] = ModelParallelStrategy(2, 1, save_distributed_checkpoint=False)
    trainer = fit(module, Tokens(parallel.share), folder, callbacks=[watch], **CLIPPED, **options)
    weight = module.model.blocks[1].self_attn.q_proj.weight
    assert hasattr(weight, "full_tensor") == ("strategy" in options)
    trainer.save_checkpoint(f"{folder}/{strategy} {kind} {1 + is_initialized()}.ckpt")
    losses = torch.stack(watch.losses)
    if is_initialized():
        all_reduce(losses)
        losses = losses / 2
    bits = validation_scores(trainer, "validation/bits_per_token")
    return {"losses": losses, "state": dict(module.model.state_dict()), "bits": bits}


def train_all(parallel, folder):
    """All ways, in one start of the processes, which takes longer than their work."""
    return {
        name: train(parallel, *name.split(), folder)
        for name in ("ddp top-k", "fsdp2 dense", "fsdp2 top-k")
    }


def opened(kind, checkpoint):
    """Open a checkpoint in this process; return weights, moments and the next learning rates."""
    module = module_of(kind)
    trainer = fit(module, Tokens(), checkpoint.parent, resume=checkpoint, **CLIPPED)
    assert trainer.global_step == STEPS
    state = trainer.optimizers[0].state
    moments = {n: state[p]["exp_avg"] for n, p in module.model.named_parameters()}
    return {**module.model.state_dict()}, moments, module.lr_schedulers().get_last_lr()


@pytest.mark.costly("three training runs on two ranks")
def test_two_ranks_equal_one_process_and_their_checkpoints_open(two_ranks, tmp_path):
    found = two_ranks(train_all, str(tmp_path), tolerance=1e-10)
    for kind in KINDS:
        name = f"fsdp2 {kind}"
        result = found[name]
        start = module_of(kind).model.state_dict()
        assert all((result["state"][n] - start[n]).abs().max() > 0.01 for n in start)
        assert result["losses"][-1] < result["losses"][0]
        assert 0 < result["bits"]["validation/bits_per_token"] < 9
        weights, moments, rates = opened(kind, tmp_path / f"{name} 2.ckpt")
        assert_close(weights, result["state"], rtol=1e-10, atol=1e-10)
        _, expected, expected_rates = opened(kind, tmp_path / f"{name} 1.ckpt")
        assert_close(moments, expected, rtol=1e-9, atol=1e-11)
        assert all(moment.abs().max() > 1e-6 for moment in moments.values())
        assert rates == expected_rates
