"""A training step of ours next to that of torch-rechub, with the same mathematics.

The optional extra ``bench`` installs it (https://github.com/datawhalechina/torch-rechub, MIT).
29 fields of 16 features, 8 tasks, 8 experts of [256, 128], towers of [64], a batch of 4,096 rows,
float32. Both have its habit of batch normalization before every activation, also before the softmax
of the gates, the same weights at first, and Adam with weight decay for all parameters. It has a
module per expert, gate, tower and table, and takes the step of its trainer; ours are stacked, the
loss is taken on logits, and Adam is fused. The matmuls of PLE are three quarters of its step, so
that no implementation of the same mathematics can be more than 1.3 times as fast.
"""

import importlib
import importlib.util
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.comparison import Call, Comparison, Load
from recsys.schema import Task

FIELDS, DIM, ROWS_OF_TABLE = 29, 16, 100
TASKS, EXPERTS, BATCH = 8, 8, 4096
LEVELS, SPECIFIC, SHARED = 2, 1, 1
EXPERT_DIMS, TOWER_DIMS = [256, 128], [64]
ADAM: dict[str, Any] = {"lr": 1e-3, "weight_decay": 1e-5}  # of its trainer
MODES = {"ours": "reference", "ours, C++": "cpp"}
BARS = {"MMoE": 1 / 1.2, "PLE": 1 / 1.2}
ABSENT = "torch-rechub is not installed: pip install 'gatesuite[bench]'"
MLP = [("mlp.0", "mlp.1"), ("mlp.4", "mlp.5")]  # linear map and normalization of its layers
NORM = ("weight", "bias", "running_mean", "running_var")


def is_installed() -> bool:
    """Return whether the peer can be imported."""
    return importlib.util.find_spec("torch_rechub") is not None


def comparisons() -> Iterator[Comparison]:
    """MMoE, and PLE of two levels; on one CPU thread."""
    yield training_step("MMoE")
    yield training_step("PLE")


def training_step(name: str) -> Comparison:
    """Return a step of theirs and of ours."""

    def build(load: Load) -> Mapping[str, Call]:
        ids, labels = batch()
        calls = {}
        for variant, mode in MODES.items():
            theirs, ours = pair(name, load)
            calls[variant] = in_mode(our_step(ours, ids, labels), mode, load)
        if theirs is not None:
            calls["torch-rechub"] = their_step(theirs, ids, labels)
        return calls

    return Comparison(
        name=f"training step of {name}, {TASKS} tasks, batch {BATCH}",
        op="rechub",
        build=build,
        baseline="torch-rechub",
        bars={"ours, C++": BARS[name]},
        units=dict.fromkeys((*MODES, "torch-rechub"), BATCH),
        unit="sample",
        rate="samples/s",
        absent={} if is_installed() else {"torch-rechub": ABSENT},
        memory=4e9,
    )


def batch(seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return ids (B, F) and labels (B, T) of a batch."""
    draw = torch.Generator().manual_seed(seed)
    ids = torch.randint(ROWS_OF_TABLE, (BATCH, FIELDS), generator=draw)
    return ids, torch.randint(2, (BATCH, TASKS), generator=draw).float()


def in_mode(call: Call, mode: str, load: Load) -> Call:
    """Return a function that calls another with the ops computed as ``kernels`` names it."""
    kernels = load("core_gates.ops").kernels

    def chosen() -> object:
        with kernels(mode):
            return call()

    return chosen


def our_step(model: nn.Module, ids: Tensor, labels: Tensor) -> Call:
    """Return a function that takes a step of training and returns the losses of the tasks."""
    adam = torch.optim.Adam(model.parameters(), fused=True, **ADAM)

    def call() -> Tensor:
        losses = F.binary_cross_entropy_with_logits(model(ids), labels, reduction="none").mean(0)
        adam.zero_grad()
        losses.mean().backward()
        adam.step()
        return losses.detach()

    return call


def their_step(model: nn.Module, ids: Tensor, labels: Tensor) -> Call:
    """Return the same for torch-rechub, what ``MTLTrainer.train_one_epoch`` does with a batch."""
    trainers: Any = importlib.import_module("torch_rechub.trainers")
    trainer = trainers.MTLTrainer(model, ["classification"] * TASKS, optimizer_params=ADAM)
    features = {f"f{i}": column for i, column in enumerate(ids.unbind(1))}

    def call() -> Tensor:
        y = model(features)
        losses = [trainer.loss_fns[t](y[:, t], labels[:, t]) for t in range(TASKS)]
        loss = sum(losses) / TASKS + trainer.reg_loss_fn(model)
        model.zero_grad()
        loss.backward()
        trainer.optimizer.step()
        return torch.tensor([loss.item() for loss in losses])

    return call


class Ours(nn.Module):
    """A network of ours on embeddings, one table for all fields.

    Args:
        load: Imports a module of the tree that is measured.
        name: ``MMoE`` or ``PLE``.
    """

    def __init__(self, load: Load, name: str) -> None:
        super().__init__()
        options: dict[str, Any] = {
            "dim": EXPERT_DIMS[-1],
            "hidden_dims": EXPERT_DIMS[:-1],
            "norm": "batch",
            "gate_norm": "batch",
            "tower_dims": TOWER_DIMS,
            "tower_norm": "batch",
            "tower_activation": "relu",
        }
        levels = {"levels": LEVELS, "num_task_experts": SPECIFIC, "num_shared_experts": SHARED}
        options |= {"num_experts": EXPERTS} if name == "MMoE" else levels
        tasks = [Task(f"t{t}") for t in range(TASKS)]
        self.tables = nn.Embedding(FIELDS * ROWS_OF_TABLE, DIM)
        self.register_buffer("starts", ROWS_OF_TABLE * torch.arange(FIELDS))
        self.starts: Tensor
        self.net = load("recsys.models").build(name, options, FIELDS * DIM, tasks)

    def forward(self, ids: Tensor) -> Tensor:
        """Return the logits (B, T) of ids (B, F)."""
        logits: Tensor = self.net(self.tables(ids + self.starts).flatten(1))
        return logits


def pair(name: str, load: Load) -> tuple[Any, Ours]:
    """Return a network of torch-rechub, None without it, and ours with the same weights."""
    torch.manual_seed(0)
    ours = Ours(load, name)
    if not is_installed():
        return None, ours
    theirs = _theirs(name)
    for table in theirs.embedding.parameters():  # its 1e-4 would drown in the rounding of biases
        nn.init.normal_(table, std=0.1)
    state = theirs.state_dict()
    tables = [state[f"embedding.embed_dict.f{i}.weight"] for i in range(FIELDS)]
    _copy(ours, {"tables.weight": torch.cat(tables)} | _stacked(name, state))
    return theirs, ours


def _theirs(name: str) -> Any:
    features: Any = importlib.import_module("torch_rechub.basic.features")
    models: Any = importlib.import_module("torch_rechub.models.multi_task")
    fields = [features.SparseFeature(f"f{i}", ROWS_OF_TABLE, DIM) for i in range(FIELDS)]
    kinds, towers = ["classification"] * TASKS, [{"dims": TOWER_DIMS}] * TASKS
    experts = {"dims": EXPERT_DIMS}
    if name == "MMoE":
        return models.MMOE(fields, kinds, EXPERTS, experts, towers)
    return models.PLE(fields, kinds, LEVELS, SPECIFIC, SHARED, experts, towers)


def _stacked(name: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return their weights under our names, flat."""
    tensors_of_ours: dict[str, Tensor] = {}

    def join(ours: str, theirs: Sequence[str], parts: Sequence[str] = ("weight", "bias")) -> None:
        for part in parts:
            tensors = [state[f"{module}.{part}"].flatten() for module in theirs]
            tensors_of_ours[f"net.{ours}.{part}"] = torch.cat(tensors)

    def experts(ours: str, theirs: Sequence[str], layers: Sequence[tuple[str, str]]) -> None:
        for j, (linear, norm) in enumerate(layers):
            for kind, part in (("weights", "weight"), ("biases", "bias")):
                tensors = [state[f"{e}.{linear}.{part}"].flatten() for e in theirs]
                tensors_of_ours[f"net.{ours}.{kind}.{j}"] = torch.cat(tensors)
            join(f"{ours}.norms.{j}", [f"{e}.{norm}" for e in theirs], NORM)

    def gates(ours: str, theirs: Sequence[str]) -> None:
        join(ours, [f"{gate}.mlp.0" for gate in theirs])
        join(f"{ours}.norm", [f"{gate}.mlp.1" for gate in theirs], NORM)

    if name == "MMoE":
        experts("experts", [f"experts.{e}" for e in range(EXPERTS)], MLP)
        gates("mixture", [f"gates.{t}" for t in range(TASKS)])
    else:
        for level in range(LEVELS):
            theirs = f"cgc_layers.{level}"
            specific = [f"{theirs}.experts_specific.{e}" for e in range(TASKS * SPECIFIC)]
            shared = [f"{theirs}.experts_shared.{e}" for e in range(SHARED)]
            experts(f"layers.{level}.experts", specific + shared, MLP)
            last = [f"{theirs}.gate_shared"] if level < LEVELS - 1 else []
            names = [f"{theirs}.gates_specific.{t}" for t in range(TASKS)]
            gates(f"layers.{level}.mixture", names + last)
    towers = [f"towers.{t}" for t in range(TASKS)]
    experts("towers.hidden", towers, MLP[:1])
    join("towers", [f"{tower}.mlp.4" for tower in towers])
    return tensors_of_ours


@torch.no_grad()
def _copy(module: nn.Module, values: Mapping[str, Tensor]) -> None:
    for name, target in module.state_dict().items():
        if not name.endswith("num_batches_tracked") and name != "starts":
            target.copy_(values[name].view_as(target))
