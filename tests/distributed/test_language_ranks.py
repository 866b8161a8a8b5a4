"""A decoder trained on two processes, its blocks whole or sharded, against one process."""

import warnings
from functools import partial

import lightning as L
import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch.distributed import is_initialized
from torch.testing import assert_close
from torch.utils.data import DataLoader

from core_gates.gates import TopKGate
from core_gates.moe import StackedExperts
from harness.runs.terminal import quiet_lightning
from language.model import Decoder
from language.module import LanguageModule

STEPS = 10
KINDS = {
    "dense": {"tie_embeddings": True},
    "top-k": {
        "gate": partial(TopKGate, num_experts=4, k=2),
        "experts": partial(StackedExperts, hidden_dim=8),
    },
}
LOSSES = {"dense": {}, "top-k": {"balance": 0.1, "z": 0.01}}


class Watch(L.Callback):
    """Gather the cross-entropy of every step."""

    def __init__(self):
        self.losses = []

    def on_train_batch_end(self, trainer, module, outputs, batch, index):
        self.losses.append(trainer.callback_metrics["train/loss"].double())


def module_of(kind, checkpointing=False):
    torch.manual_seed(0)
    sizes = {"hidden_dim": 24, "context": 12, "dtype": torch.float64, "qk_norm": True}
    model = Decoder(29, 16, 2, 4, 2, checkpointing=checkpointing, **sizes, **KINDS[kind])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2).add_(parameter.ndim == 1)
    return LanguageModule(model, 1e-2, warmup_steps=3, losses=LOSSES[kind])


def trainer_of(strategy, steps):
    options = {"devices": 1}
    if is_initialized() and strategy == "ddp":
        options = {"devices": 2, "strategy": DDPStrategy(process_group_backend="gloo")}
    elif is_initialized():
        whole = {"save_distributed_checkpoint": False, "process_group_backend": "gloo"}
        sharding = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1, **whole)
        options = {"devices": 2, "strategy": sharding}
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    return L.Trainer(
        accelerator="cpu", max_steps=steps, gradient_clip_val=1.0, use_distributed_sampler=False,
        enable_model_summary=False, callbacks=[Watch()], **quiet, **options,
    )  # fmt: skip


def batches(parallel):
    generator = torch.Generator().manual_seed(1)
    whole = [torch.randint(29, (8, 13), generator=generator) for _ in range(STEPS)]
    return DataLoader([parallel.share(batch) for batch in whole], batch_size=None)


def fit(parallel, strategy, kind, checkpoint):
    """Train for ten steps; return the state, and the losses, of which ranks have the mean."""
    module, trainer = module_of(kind, checkpointing=True), trainer_of(strategy, STEPS)
    trainer.fit(module, batches(parallel))
    sharded = strategy == "fsdp2" and is_initialized()
    block = module.model.blocks[1].self_attn.q_proj.weight
    assert hasattr(block, "full_tensor") == sharded
    trainer.save_checkpoint(checkpoint)
    losses = torch.stack(trainer.callbacks[0].losses)
    if is_initialized():
        torch.distributed.all_reduce(losses)
        losses = losses / 2
    return {"losses": losses, "state": dict(module.model.state_dict())}


def train(parallel, folder):
    quiet_lightning()
    warnings.simplefilter("ignore")  # Lightning's advice on loaders
    return {
        f"{strategy} {kind}": fit(
            parallel, strategy, kind, f"{folder}/{strategy} {kind} {1 + is_initialized()}.ckpt"
        )
        for strategy in ("ddp", "fsdp2")
        for kind in KINDS
    }


def opened(kind, checkpoint):
    """Open a checkpoint in this process; return weights, moments and the next learning rates."""
    module, trainer = module_of(kind), trainer_of(None, STEPS)
    trainer.fit(module, DataLoader([0]), ckpt_path=checkpoint)  # all steps are done
    assert trainer.global_step == STEPS
    state = trainer.optimizers[0].state
    moments = {n: state[p]["exp_avg"] for n, p in module.model.named_parameters()}
    return {**module.model.state_dict()}, moments, module.lr_schedulers().get_last_lr()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.costly("three processes import Lightning and train four models")
def test_two_ranks_equal_one_process_and_their_checkpoints_open(two_ranks, tmp_path):
    found = two_ranks(train, str(tmp_path), tolerance=1e-10)
    for name, result in found.items():
        kind = name.split()[1]
        start = module_of(kind).model.state_dict()
        assert all((result["state"][n] - start[n]).abs().max() > 0.01 for n in start)
        assert result["losses"][-1] < result["losses"][0]
        weights, moments, rates = opened(kind, tmp_path / f"{name} 2.ckpt")
        assert_close(weights, result["state"], rtol=1e-10, atol=1e-10)
        _, expected, expected_rates = opened(kind, tmp_path / f"{name} 1.ckpt")
        assert_close(moments, expected, rtol=1e-9, atol=1e-11)
        assert all(moment.abs().max() > 1e-6 for moment in moments.values())
        assert rates == expected_rates
