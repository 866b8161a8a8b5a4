"""Gates trained on two processes, the model whole or sharded, against one process."""

import lightning as L
import torch
from torch import nn
from torch.distributed import is_initialized

from core_gates.adapters import AdapterCapacity
from diffusion.fusion import GatedFusion
from diffusion.fusion.fusion_module import FusionModule, strategy_of
from diffusion.fusion.fusion_tasks import FusionTask, PairDataModule
from diffusion.lora_file import Factors, LoraBundle
from diffusion.models.embedded_base import transformer_of
from diffusion.models.text_encoders import TextStates
from harness.runs.terminal import quiet_lightning

STEPS = 2


def normal(*sizes, scale=1.0):
    return scale * torch.randn(*sizes, dtype=torch.float64)


def states(count):
    return TextStates(normal(count, 5, 384), normal(count, 384))


def build():
    """Two adapters of a small FLUX, two tasks of five latents."""
    torch.manual_seed(0)
    model = transformer_of("unit").double().eval()
    layers = [
        (n, m) for n, m in model.named_modules() if isinstance(m, nn.Linear) and "blocks" in n
    ]
    library = {
        name: LoraBundle("flux", {
            n: Factors(
                normal(2, m.in_features, scale=0.2), normal(m.out_features, 2, scale=0.2), 1.0
            )
            for n, m in layers
        })
        for name in "abc"
    }  # fmt: skip
    tasks = [
        FusionTask(pair, normal(5, 12, 4, 4), states(5), states(2), normal(5, len(pair)))
        for pair in (("a", "b"), ("c",))
    ]
    told = {"factors": True, "switch": True}
    fusion = GatedFusion(model, {}, capacity=AdapterCapacity(2, 2), dtype=torch.float64, **told)
    module = FusionModule(
        fusion, library, steps=STEPS, contrast=True, margin=2.0, roles={"a": "subject"}
    )
    return module, PairDataModule(tasks, states(1), steps=STEPS, batch_size=4)


def fit(strategy):
    """Train on all processes that there are; return the gates."""
    options = {"devices": 1}
    if is_initialized():
        options = {"devices": 2, "strategy": strategy_of(strategy, 2, "gloo")}
    module, data = build()
    L.Trainer(
        accelerator="cpu", max_epochs=1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, use_distributed_sampler=False,
        **options,
    ).fit(module, data)  # fmt: skip
    weight = module.fusion.model.transformer_blocks[0].norm1.linear.weight
    assert hasattr(weight, "full_tensor") == (strategy == "fsdp2" and is_initialized())
    return dict(module.fusion.state_dict())


def train(_parallel):
    quiet_lightning()
    return {strategy: fit(strategy) for strategy in ("ddp", "fsdp2")}


def test_two_ranks_train_the_gates_of_one_process(two_ranks):
    found = two_ranks(train, tolerance=1e-6)
    start = build()[0].fusion.state_dict()
    assert sum(not torch.equal(found["ddp"][name], tensor) for name, tensor in start.items()) > 50
    assert not torch.equal(found["ddp"]["context.switch"], start["context.switch"])
    assert any(not torch.equal(found["ddp"][n], t) for n, t in start.items() if "factors" in n)
