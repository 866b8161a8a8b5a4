"""Training with Lightning: what is logged, resumed, averaged and refused."""

import lightning as L
import pytest
import torch
from torch import nn
from torch.testing import assert_close

from core_gates.errors import GatesError
from harness.runs.loops import ExactTrainer
from recsys.balancing import flat_gradient, project
from recsys.inputs import Batch
from recsys.models import MODELS, MultiTaskNet
from recsys.ranker_module import JoinedOptimizer, MultiTaskModule
from recsys.schema import Dense, FeatureSchema, History, Sparse, Task
from recsys.validation import ScoredRows

SMALL = {"dim": 6, "hidden_dims": [8], "tower_dims": [4]}
SIZES = {"user": 30, "item": 20}
SCHEMA = FeatureSchema(
    tasks=(Task("click"), Task("like", weight=0.5, mask="seen"), Task("buy")),
    sparse=(Sparse("user", side="user"), Sparse("item", side="item")),
    dense=(Dense("age"),),
    dim=4,
)


class Transform:
    schema, sizes, dense_width = SCHEMA, SIZES, 2


def rows(number, seed):
    """Rows whose labels depend on user and item."""
    g = torch.Generator().manual_seed(seed)
    sparse = torch.stack(
        [torch.randint(size, (number,), generator=g) for size in SIZES.values()], 1
    )
    dense = torch.randn(number, 2, generator=g)
    score = sparse[:, :1] % 3 - 1 + 0.5 * (sparse[:, 1:] % 2) + 0.3 * dense[:, :1]
    score = score + torch.tensor([0.0, 0.5, -1.0])
    labels = (score.sigmoid() > torch.rand(number, 3, generator=g)).float()
    mask = torch.ones(number, 3, dtype=torch.bool)
    mask[:, 1] = torch.rand(number, generator=g) < 0.7
    weight = torch.rand(number, generator=g) + 0.5
    return Batch(sparse, dense, (), labels, mask, weight, sparse[:, 0])


class Data(L.LightningDataModule):
    transform = None

    def __init__(self, batch_size=32, number=192):
        super().__init__()
        self.batch_size, self.number = batch_size, number

    def setup(self, stage):
        self.transform = Transform()

    def batches(self, seed):
        everything = rows(self.number, seed)
        return [
            everything.take(slice(i, i + self.batch_size))
            for i in range(0, self.number, self.batch_size)
        ]

    def train_dataloader(self):
        return torch.utils.data.DataLoader(self.batches(0), batch_size=None)

    def val_dataloader(self):
        return torch.utils.data.DataLoader(self.batches(1), batch_size=None)


@pytest.fixture
def trainer(tmp_path, recwarn):
    def make(**options):
        return ExactTrainer(
            accelerator="cpu",
            default_root_dir=tmp_path,
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            logger=False,
            enable_checkpointing=False,
            **options,
        )

    return make


pytestmark = pytest.mark.filterwarnings(
    "ignore:The '.*_dataloader' does not have many workers", "ignore:GPU available"
)


def made(net="MMoE", **options):
    torch.manual_seed(0)
    return MultiTaskModule(net, {**SMALL, **options.pop("more", {})}, **options)


def fit(trainer, module, data=None, **options):
    torch.manual_seed(1)
    own = trainer(**options)
    own.fit(module, datamodule=data or Data())
    return own


def test_training_lowers_the_loss_and_sorts_every_task(trainer):
    module, data = made(learning_rate=1e-2, embedding_learning_rate=0.1), Data(number=960)
    before = trainer().validate(module, datamodule=data, verbose=False)[0]
    found = fit(trainer, module, data, max_epochs=6, log_every_n_steps=1).callback_metrics
    assert found["val/loss"] < before["val/loss"] - 0.05
    for task in SCHEMA.task_names:
        assert found[f"val/auc_{task}"] > 0.6
        assert f"train/loss_{task}" in found
    assert_close(found["val/loss"], sum(found[f"val/loss_{t}"] for t in SCHEMA.task_names))


def test_the_loss_that_is_followed(trainer):
    """Weights of tasks, masks, and what the network adds."""
    module = made(f"{__name__}.Calibrated")
    trainer(max_epochs=1).validate(module, datamodule=Data(), verbose=False)
    module.trainer = trainer()
    module.train()
    module.log = lambda *_, **__: None
    batch = rows(16, 3)
    found = module.training_step(batch, 0)
    logits = module(batch)
    bce = torch.nn.functional.binary_cross_entropy_with_logits(
        logits, batch.labels, reduction="none"
    )
    weight = batch.mask * batch.weight[:, None]
    wanted = (bce * weight).sum(0) / weight.sum(0) @ torch.tensor([1.0, 0.5, 1.0])
    p = logits.sigmoid()
    calibrator = (p[:, :-1] - p[:, 1:]).relu().mean(0).sum()
    assert calibrator > 0
    assert_close(found, wanted + calibrator)


@pytest.mark.fault("video R4")
def test_balancing_knows_which_tasks_count(trainer):
    """Tasks without rows in the batch, or of weight 0, do not move their uncertainty."""
    module = made(balancing="uncertainty")
    module.trainer = trainer()
    module.build(Transform())
    module.log = lambda *_, **__: None
    batch = rows(16, 3)
    batch.mask[:, 1] = False
    module.training_step(batch, 0).backward()
    grad = module.balancer.log_variance.grad
    assert (grad != 0).tolist() == [True, False, True]
    module.loss.weights[2] = 0
    grad.zero_()
    module.training_step(batch, 0).backward()
    assert (grad != 0).tolist() == [True, False, False]


KINDS = {
    "fixed": {},
    "uncertainty": {"balancing": "uncertainty"},
    "pcgrad": {"balancing": "pcgrad", "net": "PLE"},
    "average": {"ema": 0.9, "embedding_l2": 1e-3, "weight_decay": 1e-2},
    "gates": {"more": {"gate": "DSelectKGate", "norm": "batch"}},
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.ends("three fits a case")
def test_a_resumed_run_ends_with_the_bits_of_an_uninterrupted_one(kind, trainer, tmp_path):
    whole = made(**KINDS[kind])
    long = fit(trainer, whole, max_epochs=4)
    first = made(**KINDS[kind])
    fit(trainer, first, max_epochs=2).save_checkpoint(tmp_path / "half.ckpt")
    second = made(**KINDS[kind])
    run = trainer(max_epochs=4)
    run.fit(second, datamodule=Data(), ckpt_path=tmp_path / "half.ckpt", weights_only=True)
    assert_equal(second.state_dict(), whole.state_dict())
    assert_equal(run.optimizers[0].state_dict(), long.optimizers[0].state_dict())
    pairs = zip(whole.parameters(), first.parameters(), strict=True)
    moved = [not torch.equal(a, b) for a, b in pairs]
    assert sum(moved) > len(moved) // 2


def assert_equal(found, wanted, path=""):
    if isinstance(wanted, dict):
        assert found.keys() == wanted.keys()
        for key in wanted:
            assert_equal(found[key], wanted[key], f"{path}/{key}")
    elif isinstance(wanted, list | tuple):
        for number, (a, b) in enumerate(zip(found, wanted, strict=True)):
            assert_equal(a, b, f"{path}/{number}")
    elif isinstance(wanted, torch.Tensor):
        assert torch.equal(found, wanted), path
    else:
        assert found == wanted, path


def test_gradients_of_small_batches_add_up(trainer):
    """Two batches of equal weight, accumulated, are one batch of both; clipping is of the net."""
    whole, halves = (made("SharedBottom", balancing="uncertainty") for _ in range(2))
    data = Data(16, 32)
    parts = data.batches(0)
    for part in parts:  # masks and weights alike, so that means of halves are those of all
        part.mask.fill_(True)
        part.weight.fill_(1.0)
    data.batches = lambda seed: parts
    fit(trainer, halves, data, max_epochs=1, accumulate_grad_batches=2, gradient_clip_val=0.1)
    both = Data(32, 32)
    both.batches = lambda seed: [Batch.cat(parts)]
    clipped = []

    def keep(*args, **kwargs):
        MultiTaskModule.configure_gradient_clipping(whole, *args, **kwargs)
        clipped.extend(p.grad.clone() for p in whole.ranker.parameters())

    whole.configure_gradient_clipping = keep
    fit(trainer, whole, both, max_epochs=1, gradient_clip_val=0.1)
    for a, b in zip(whole.parameters(), halves.parameters(), strict=True):
        assert_close(a, b, rtol=1e-4, atol=1e-6)
    norms = [g.norm() for g in clipped if not g.is_sparse]
    assert_close(torch.stack(norms).norm(), torch.tensor(0.1), rtol=1e-3, atol=0)
    assert any(g.is_sparse for g in clipped)


def test_evaluation_uses_the_average_and_training_does_not(trainer):
    module = made(ema=0.5, learning_rate=1e-2)
    own = fit(trainer, module, max_epochs=2)
    weights = {name: p.clone() for name, p in module.ranker.named_parameters()}
    found = own.validate(module, datamodule=Data(), verbose=False)[0]
    assert_equal(dict(module.ranker.named_parameters()), weights)
    scored = ScoredRows(SCHEMA.task_names)
    batch = rows(192, 1)
    with torch.no_grad():
        scored.add(module.served()(batch.sparse, batch.dense), batch)
    assert_close(found["val/loss"], scored.metrics()["loss"], rtol=1e-5, atol=0)
    raw = ScoredRows(SCHEMA.task_names)
    with torch.no_grad():
        raw.add(module.eval()(batch), batch)
    assert abs(raw.metrics()["loss"] - scored.metrics()["loss"]) > 1e-4
    (p,) = own.predict(module, dataloaders=torch.utils.data.DataLoader([batch], batch_size=None))
    with torch.no_grad():
        assert_close(p, module.served()(batch.sparse, batch.dense).sigmoid())
    assert_equal(dict(module.ranker.named_parameters()), weights)


@pytest.mark.fault("video V28")
def test_an_interrupted_evaluation_does_not_undo_later_training(trainer, monkeypatch):
    """As Ctrl-C in a notebook: the module lives on, and is trained further."""
    module = made(ema=0.9, learning_rate=1e-2)
    fit(trainer, module, max_epochs=1)
    weights = {name: p.clone() for name, p in module.ranker.named_parameters()}
    with monkeypatch.context() as patched:

        def fails(*_):
            raise RuntimeError("interrupted")

        patched.setattr(module, "validation_step", fails)
        with pytest.raises(RuntimeError, match="interrupted"):
            trainer().validate(module, datamodule=Data(), verbose=False)
    trainer().validate(module, datamodule=Data(), verbose=False)
    assert_equal(dict(module.ranker.named_parameters()), weights)
    own = trainer(max_epochs=1)
    ends = []
    step = module.optimizer_step

    def noted(*args, **kwargs):
        step(*args, **kwargs)
        ends.append({name: p.clone() for name, p in module.ranker.named_parameters()})

    monkeypatch.setattr(module, "optimizer_step", noted)
    own.fit(module, datamodule=Data())
    assert_equal(dict(module.ranker.named_parameters()), ends[-1])


def test_intercepts_come_from_validation_rows_after_training(trainer):
    module = made(ema=0.5, intercepts="validation")
    fit(trainer, module, max_epochs=1)
    assert not module.ranker.intercepts.any()  # training has none
    batch = rows(192, 1)
    served = module.served(batch)
    with torch.no_grad():
        predicted = served(batch.sparse, batch.dense).sigmoid()
    counted = batch.mask * batch.weight.unsqueeze(1)
    wanted = (counted * batch.labels).sum(0)
    assert_close((counted * predicted).sum(0), wanted, rtol=1e-4, atol=1e-4)
    assert served.intercepts.any()
    with pytest.raises(GatesError, match="gets its intercepts from validation rows, and none"):
        module.served()
    assert not module.served(intercepts=False).intercepts.any()


class WithHistory(Transform):
    schema = FeatureSchema(
        tasks=SCHEMA.tasks,
        sparse=SCHEMA.sparse,
        sequences=(History("past", of="item", encoder="transformer"),),
        dim=4,
    )
    dense_width = 0


@pytest.mark.fault("video R6")
@pytest.mark.parametrize("net", ["SingleTask", "HoME"])
def test_pcgrad_projects_what_tasks_share_encoders_included(net, trainer):
    """The gradient of the shared parameters, as one vector, is projected; tables have the plain."""
    more = {"tower_norm": None} if net != "HoME" else {"norm": None}
    module = made(net, balancing="pcgrad", more=more)
    module.trainer = trainer()
    ranker = module.build(WithHistory())
    module.log = lambda *_, **__: None
    drawn = rows(16, 3)
    past = torch.randint(2, 20, (16, 5), generator=torch.Generator().manual_seed(0))
    targets = drawn.labels, drawn.mask, drawn.weight, drawn.sparse[:, 0]
    batch = Batch(drawn.sparse, drawn.dense[:, :0], (past,), *targets)
    losses = module.loss(module(batch), batch.labels, batch.mask, batch.weight)
    losses = losses * module.loss.weights
    shared = ranker.all_shared()
    gradients = torch.stack([flat_gradient(loss, shared) for loss in losses])
    further = sum(ranker.net.losses(module(batch)).values(), torch.zeros((), requires_grad=True))
    torch.manual_seed(7)
    wanted = project(gradients).sum(0)
    assert (wanted - gradients.sum(0)).norm() > 0.01 * wanted.norm()
    wanted = wanted + flat_gradient(further, shared)
    table = ranker.tables()[0]
    plain = torch.autograd.grad(losses.sum() + further, table)[0].to_dense()
    torch.manual_seed(7)
    module.training_step(batch, 0).backward()
    found = torch.cat([p.grad[rows].flatten() for p, rows in shared])
    assert_close(found, wanted, rtol=1e-4, atol=1e-6)
    assert_close(table.grad.to_dense(), plain, rtol=1e-4, atol=1e-6)
    encoders = {id(p) for p in ranker.input_layers[0].encoders.parameters()}
    assert encoders <= {id(p) for p, _ in shared}


@pytest.mark.fault("video R14")
def test_normalizations_and_biases_have_no_decay():
    """Also the normalization in a layer of a transformer, whose name says nothing of it."""
    module = made("PLE", weight_decay=0.1, more={"norm": "batch", "gate_norm": "batch"})
    ranker = module.build(WithHistory())
    groups = module.configure_optimizers().param_groups
    decay = {id(p): group.get("weight_decay", 0) for group in groups for p in group["params"]}
    found = {
        (type(owner).__name__, name, decay[id(parameter)])
        for owner in ranker.modules()
        for name, parameter in owner.named_parameters(recurse=False)
        if not isinstance(owner, torch.nn.ParameterList)
    }
    kinds = {kind for kind, *_ in found}
    free = {"LayerNorm", "ExpertNorm", "SyncBatchNorm", "Embedding"}
    assert free | {"Linear", "GateNetworks", "Towers"} <= kinds
    for kind, name, value in found:
        assert value == (0 if name == "bias" or kind in free else 0.1), (kind, name)


def test_a_network_without_prior_refuses_one():
    with pytest.raises(GatesError, match="MMoE takes no prior, but prior names user: leave it"):
        made(prior=["user"]).build(Transform())


class Calibrated(MODELS["SharedBottom"]):
    """A network that adds a loss."""

    def __init__(self, input_dim, tasks, **options):
        super().__init__(input_dim, tasks, **options)

    def losses(self, logits):
        p = logits.sigmoid()
        return {"calibration": (p[:, :-1] - p[:, 1:]).relu().mean(0).sum()}


class Told(MultiTaskNet):
    """A network with a prior."""

    def __init__(self, input_dim, tasks, *, prior_dim=0, device=None):
        super().__init__(input_dim, tasks)
        self.prior_dim = prior_dim
        self.linear = nn.Linear(input_dim + prior_dim, len(self.tasks), device=device)

    def forward(self, v, prior=None, ids=None):
        return self.linear(torch.cat([v, prior], 1))


def test_a_prior_gets_its_width(trainer):
    module = MultiTaskModule(f"{__name__}.Told", prior=["user"])
    fit(trainer, module, max_epochs=1)
    assert module.ranker.net.prior_dim == 4


def test_mistakes_are_one_line(trainer, refuses):
    refuses(
        GatesError,
        (
            r"built from the transform of a DataModule",
            lambda: trainer(max_epochs=1).fit(made(), torch.utils.data.DataLoader([rows(8, 0)])),
        ),
        (r"no network 'mmoe' .did you mean 'MMoE'", lambda: made("mmoe").build(Transform())),
        (
            r"balancing is 'pcgrd' .did you mean 'pcgrad'",
            lambda: made(balancing="pcgrd").build(Transform()),
        ),
        (
            "a training batch has a single row",
            lambda: fit(trainer, made(), Data(1, 1), max_epochs=1),
        ),
    )


def parameters(seed=0):
    torch.manual_seed(seed)
    return [nn.Parameter(torch.randn(3)) for _ in range(3)]


def both(ps):
    return [torch.optim.Adam(ps[:2], lr=0.1), torch.optim.SGD(ps[2:], lr=0.5, momentum=0.9)]


def backward(ps, step):
    loss = sum(((i + 1) * p - step).square().sum() for i, p in enumerate(ps))
    loss.backward()
    return loss


def test_it_steps_as_both_do():
    ours, theirs = parameters(), parameters()
    joined, apart = JoinedOptimizer(both(ours)), both(theirs)
    for step in range(4):
        joined.zero_grad()
        assert ours[0].grad is None
        loss = joined.step(lambda s=step: backward(ours, s))
        for optimizer in apart:
            optimizer.zero_grad()
        assert loss == backward(theirs, step)
        for optimizer in apart:
            optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_schedulers_find_all_groups():
    joined = JoinedOptimizer(both(parameters()))
    schedule = torch.optim.lr_scheduler.LambdaLR(joined, lambda step: 1 / (1 + step))
    joined.step()
    schedule.step()
    assert [g["lr"] for g in joined.param_groups] == [0.05, 0.25]
    assert [g["lr"] for o in joined.optimizers for g in o.param_groups] == [0.05, 0.25]


def test_mistakes(refuses):
    ps = parameters()
    refuses(
        ValueError,
        ("parameter in common", lambda: JoinedOptimizer([*both(ps), torch.optim.SGD(ps[:1])])),
        ("empty", lambda: JoinedOptimizer([])),
    )
    joined = JoinedOptimizer(both(ps))
    refuses(
        ValueError,
        (
            "state is that of 0 joined optimizers, not 2",
            lambda: joined.load_state_dict(torch.optim.SGD(ps).state_dict()),
        ),
        ("add the group to one", lambda: joined.add_param_group({"params": parameters()})),
    )
