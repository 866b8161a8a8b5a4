"""Training of a ranker: losses of its tasks, their balance, two optimizers, validation."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, Protocol, cast

import lightning as L
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.optim import Optimizer

from core_gates.errors import GatesError, check_at_least, check_fraction, check_positive
from core_gates.routing.collect import update_gates
from recsys.balancing import Balancer, balancer, check_balancing
from recsys.embedding.bank import Spread, spread, spread_names
from recsys.embedding.row_wise_adagrad import RowWiseAdagrad
from recsys.inputs import Batch, InputLayer
from recsys.model_folder import ranker_to_start_from
from recsys.models import check_options, options_of
from recsys.ranker import Ranker
from recsys.schema import FeatureSchema
from recsys.validation import MultiTaskLoss, ScoredRows, WeightAverage, calibrate


class JoinedOptimizer(Optimizer):
    """Optimizers of different parameters as one, such as Adam and row-wise Adagrad for tables.

    A trainer that knows a single optimizer can so use several: schedulers find the groups of all,
    and the state of all is saved and loaded.

    Args:
        optimizers: They have no parameter in common.

    Attributes:
        optimizers: As given.

    Raises:
        ValueError: There is none, or two have a parameter in common.
    """

    optimizers: tuple[Optimizer, ...] = ()

    def __init__(self, optimizers: Sequence[Optimizer]) -> None:
        parameters = [p for o in optimizers for group in o.param_groups for p in group["params"]]
        if len({id(p) for p in parameters}) < len(parameters):
            raise ValueError("two optimizers have a parameter in common")
        super().__init__(parameters, {})  # refuses an empty list
        self.optimizers = tuple(optimizers)

    @property  # type: ignore[override]
    def param_groups(self) -> list[dict[str, Any]]:
        """The groups of all optimizers; a change of an entry is theirs."""
        return [group for optimizer in self.optimizers for group in optimizer.param_groups]

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        """Ignore what the base class sets: the groups are those of the optimizers."""

    @property  # type: ignore[override]
    def state(self) -> dict[Tensor, Any]:
        """The state of all parameters."""
        return {p: state for optimizer in self.optimizers for p, state in optimizer.state.items()}

    @state.setter
    def state(self, state: dict[Tensor, Any]) -> None:
        """Ignore what the base class sets: the state is that of the optimizers."""

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Let every optimizer step.

        Args:
            closure: Computes gradients and returns the loss; called once.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for optimizer in self.optimizers:
            optimizer.step()
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop all gradients."""
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none)

    def state_dict(self) -> dict[str, Any]:
        """Return the state of every optimizer, in order."""
        return {"optimizers": [optimizer.state_dict() for optimizer in self.optimizers]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the state of `state_dict`.

        Raises:
            ValueError: It is that of another number of optimizers or parameters.
        """
        states = state_dict.get("optimizers", ())
        if len(states) != len(self.optimizers):
            raise ValueError(
                f"the state is that of {len(states)} joined optimizers, not {len(self.optimizers)}"
            )
        for optimizer, state in zip(self.optimizers, states, strict=True):
            optimizer.load_state_dict(state)

    def add_param_group(self, param_group: dict[str, Any]) -> None:  # noqa: ARG002
        """Refuse a group, unless the base class starts: one of the optimizers must take it.

        Raises:
            ValueError: There are optimizers already.
        """
        if self.optimizers:
            raise ValueError("add the group to one of the optimizers that are joined")

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)


NORMALIZATIONS = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
"""Kinds of modules whose parameters have no weight decay."""


class Transform(Protocol):
    """What a module must know of fitted data, as a ``FeatureTransform`` does."""

    schema: FeatureSchema

    @property
    def sizes(self) -> Mapping[str, int]:
        """Rows by name of the table."""

    @property
    def dense_width(self) -> int:
        """Dense inputs."""

    @property
    def scalers(self) -> Mapping[str, Any]:
        """How dense columns are scaled, by name."""


class MultiTaskModule(L.LightningModule):
    """A ranker that is trained on all tasks at once.

    The network is built when the data are known: their DataModule has the ``transform``.

    Args:
        net: Name of the network in ``recsys.models.MODELS``, or ``package.module.Name``.
        options: Options of the network, by name.
        prior: Features that a network with ``prior_dim`` gets as its prior.
        encoders: Options of the encoders of histories, by name of the history.
        learning_rate: Learning rate of Adam, for all but the tables.
        embedding_learning_rate: Learning rate of row-wise Adagrad, for the tables.
        embedding_l2: L2 penalty of table rows that a batch touches.
        weight_decay: Decoupled decay of the weights of the network; biases, normalizations and
            tables have none.
        balancing: How tasks are balanced, one of ``recsys.balancing.BALANCERS``.
        ema: Decay of a moving average of the weights, tables aside, with which the network is
            evaluated; None for none.
        tables: Tables on several ranks: ``replicated``, whole on each, or ``sharded``, a part on
            each, see `recsys.embedding.bank.spread`. None is ``replicated``.
        intercepts: Where tasks get their intercepts from after training: from the ``validation``
            rows, so that the mean prediction of every task is its rate there, see
            `recsys.validation`. None keeps those of training.
        start: Model folder of a trained ``Linear`` that ``Linear`` or ``WideAndDeep`` starts from,
            see `recsys.ranker.Ranker.start_from`; None for none.

    Attributes:
        ranker: The network with its tables, once it is built.
        optimizer_start: State that the optimizers start from, such as that of the day before; None
            for none.

    Raises:
        ValueError: A rate is not positive, a penalty negative, or ``ema`` lies outside of [0, 1).
        GatesError: The network or the balancing do not exist or refuse an option.
    """

    ranker: Ranker
    loss: MultiTaskLoss
    balancer: Balancer

    def __init__(
        self,
        net: str = "HoME",
        options: dict[str, Any] | None = None,
        *,
        prior: Sequence[str] = (),
        encoders: dict[str, dict[str, Any]] | None = None,
        learning_rate: float = 1e-3,
        embedding_learning_rate: float = 0.02,
        embedding_l2: float = 0.0,
        weight_decay: float = 0.0,
        balancing: str = "fixed",
        ema: float | None = None,
        tables: Spread | None = None,
        intercepts: Literal["validation"] | None = None,
        start: str | None = None,
    ) -> None:
        super().__init__()
        rates = {"learning_rate": learning_rate, "embedding_learning_rate": embedding_learning_rate}
        check_positive(**rates)
        check_at_least(0, embedding_l2=embedding_l2, weight_decay=weight_decay)
        if ema is not None:
            check_fraction(ema=ema)
        check_options(net, options or {})
        check_balancing(balancing)
        self.save_hyperparameters()
        self.net, self.options = net, dict(options or {})
        self.prior, self.encoders = tuple(prior), dict(encoders or {})
        self.learning_rate, self.weight_decay = learning_rate, weight_decay
        self.embedding_learning_rate, self.embedding_l2 = embedding_learning_rate, embedding_l2
        self.balancing = balancing
        self.ema, self.tables, self.intercepts, self.start = ema, tables, intercepts, start
        self.optimizer_start: dict[str, Any] | None = None
        self.average: WeightAverage | None = None
        self.scored: ScoredRows | None = None
        self._swap = ExitStack()

    def configure_model(self) -> None:
        """Build the ranker from the transform of the DataModule, once, and spread its tables.

        Raises:
            GatesError: There is no DataModule with a ``transform``.
        """
        self._swap.close()  # of an evaluation that was interrupted
        if not hasattr(self, "ranker"):
            self._build_for_data()
        if self.trainer.world_size > 1 and not any(b.is_spread for b in self.ranker.banks):
            self.ranker.to(self.trainer.strategy.root_device)  # where ranks exchange rows
            spread(self.ranker, self.tables or "replicated")

    def _build_for_data(self) -> None:
        data = getattr(self.trainer, "datamodule", None)
        if getattr(data, "transform", None) is None:
            raise GatesError(
                "the network is built from the transform of a DataModule, but the trainer has "
                "none; pass a DataModule, or call module.build(transform) first"
            )
        self.build(cast(Any, data).transform)

    def build(self, transform: Transform, start: Ranker | None = None) -> Ranker:
        """Build the ranker for fitted data and return it.

        Args:
            transform: Of the data.
            start: Trained on rows of the same transform, instead of the model folder ``start``.

        Raises:
            GatesError: The network, the balancing or an option does not exist, or the ranker
                cannot start from that one.
        """
        try:
            return self._build(transform, start)
        except ValueError as error:
            raise GatesError(f"model: {error}") from error

    def _build(self, transform: Transform, start: Ranker | None) -> Ranker:
        tasks = transform.schema.tasks
        balance = balancer(self.balancing, len(tasks))
        self.ranker = Ranker.build(
            transform.schema,
            transform.sizes,
            transform.dense_width,
            self.net,
            {**self.options, **self._prior_dim(transform)},
            prior=self.prior,
            encoders=self.encoders,
            calibrated=self.intercepts is not None,
        )
        weighted_tasks = [replace(task, weight=0.0) if task.threshold else task for task in tasks]
        self.loss, self.balancer = MultiTaskLoss(weighted_tasks), balance
        if self.ranker.heads is not None:
            self.ranker.heads.take_scalers(transform.scalers)
        if start is None and self.start is not None:
            start = ranker_to_start_from(Path(self.start), transform)
        if start is not None:
            self.ranker.start_from(start)
        if self.ema is not None:
            self.average = WeightAverage(self._dense(), self.ema)
        return self.ranker

    def forward(self, batch: Batch) -> Tensor:
        """Return the logits (B, T) of a batch."""
        logits: Tensor = self.ranker(batch.sparse, batch.dense, batch.sequences)
        return logits

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:  # noqa: ARG002
        """Return the balanced loss of a batch, with further losses of the network.

        Raises:
            GatesError: The batch is a single row.
        """
        if len(batch) < 2:
            raise GatesError(
                "a training batch has a single row, which batch normalization cannot take; choose "
                "a batch_size that leaves no such rest, or drop the last batch"
            )
        net, ranker = self.ranker.net, self.ranker
        v = ranker.inputs(batch.sparse, batch.dense, batch.sequences)
        outputs = ranker.outputs(v, ranker.ids(batch.sparse))
        logits = ranker.logits_of(outputs, batch.dense)
        losses, counted = self.loss.counted(logits, batch.labels, batch.mask, batch.weight)
        weighted = losses * self.loss.weights.to(losses)
        counted = counted & (self.loss.weights > 0)
        shared = self.ranker.all_shared() if self.balancer.needs_shared else ()
        total: Tensor = self.balancer(weighted, shared, counted)
        further = {**net.losses(outputs), **self._regression_losses(outputs, batch)}
        for loss in further.values():
            total = total + loss
        self.log("train/loss", total.detach(), batch_size=len(batch), prog_bar=True)
        if self._logs_this_step():
            self._log_tasks("train/loss", losses.detach())
            if self.balancing != "fixed":
                self._log_tasks("train/weight", self.balancer.weights)
            for name, loss in further.items():
                self.log(f"train/{name}", loss.detach())
        return total

    def _regression_losses(self, outputs: Tensor, batch: Batch) -> dict[str, Tensor]:
        """Return the loss of each number by name; none without regressions."""
        heads = self.ranker.heads
        if heads is None or batch.numbers is None:
            return {}
        losses = heads.losses(outputs, batch.numbers, batch.weight)
        weighted = zip(heads.regressions, losses, strict=True)
        return {
            f"loss_{regression.name}": regression.weight * loss for regression, loss in weighted
        }

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Step, then advance what changes once a step: routing gates and averages."""
        super().optimizer_step(*args, **kwargs)
        update_gates(self.ranker.net)
        if self.average is not None:
            self.average.update(self._dense())

    def configure_optimizers(self) -> JoinedOptimizer:
        """Return Adam for the network, and row-wise Adagrad for the tables."""
        decayed: list[Tensor] = []
        kept: list[Tensor] = list(self.balancer.parameters())
        norms = {
            id(parameter)
            for module in self.ranker.modules()
            if isinstance(module, NORMALIZATIONS)
            for parameter in module.parameters()
        }
        for name, parameter in self._dense().items():
            free = id(parameter) in norms or "bias" in name
            (kept if free else decayed).append(parameter)
        groups: list[dict[str, Any]] = [{"params": decayed}, {"params": kept, "weight_decay": 0.0}]
        optimizers: list[torch.optim.Optimizer] = [
            torch.optim.AdamW(
                [group for group in groups if group["params"]],
                lr=self.learning_rate,
                weight_decay=self.weight_decay,
                fused=True,
            )
        ]
        if tables := self.ranker.tables():
            rate, l2 = self.embedding_learning_rate, self.embedding_l2
            optimizers.append(RowWiseAdagrad(tables, lr=rate, l2=l2))
        joined = JoinedOptimizer(optimizers)
        if self.optimizer_start is not None:
            joined.load_state_dict(self.optimizer_start)
        return joined

    def configure_gradient_clipping(
        self,
        optimizer: Any,  # noqa: ARG002
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip the gradients of the network; those of tables are scaled by their optimizer."""
        if not gradient_clip_val:
            return
        parameters = self.ranker.dense_parameters()
        if gradient_clip_algorithm == "value":
            nn.utils.clip_grad_value_(parameters, gradient_clip_val)
        else:
            nn.utils.clip_grad_norm_(parameters, gradient_clip_val)

    def on_validation_epoch_start(self) -> None:
        """Begin to gather rows, with averaged weights if there are any."""
        self.scored = ScoredRows(self.ranker.schema.task_names)
        if self.average is not None:
            self._swap.enter_context(self.average.swapped(self._dense()))

    def validation_step(self, batch: Batch, batch_idx: int) -> None:  # noqa: ARG002
        """Gather the logits of a batch."""
        assert self.scored is not None
        self.scored.add(self(batch), batch)

    def on_validation_epoch_end(self) -> None:
        """Log ``val/loss``, ``val/loss_TASK`` and ``val/auc_TASK``, over the rows of all ranks."""
        self._log_metrics("val")

    def on_test_epoch_start(self) -> None:
        """Begin to gather rows, see `on_validation_epoch_start`."""
        self.on_validation_epoch_start()

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Gather the logits of a batch."""
        self.validation_step(batch, batch_idx)

    def on_test_epoch_end(self) -> None:
        """Log ``test/loss``, ``test/loss_TASK`` and ``test/auc_TASK``."""
        self._log_metrics("test")

    def on_predict_epoch_start(self) -> None:
        """Use averaged weights if there are any."""
        if self.average is not None:
            self._swap.enter_context(self.average.swapped(self._dense()))

    def predict_step(self, batch: Batch, batch_idx: int) -> Tensor:  # noqa: ARG002
        """Return the probabilities (B, T) of a batch."""
        probabilities: Tensor = self(batch).float().sigmoid()
        return probabilities

    def on_predict_epoch_end(self) -> None:
        """Return to the weights of training."""
        self._swap.close()

    def served(self, validation: Batch | None = None, *, intercepts: bool = True) -> Ranker:
        """Return the ranker in evaluation mode, a copy with averaged weights if there are any.

        Args:
            validation: Rows from which it gets its intercepts, if it has any.
            intercepts: Whether it must get them; otherwise they are 0 without rows.

        Raises:
            GatesError: It must get intercepts, but there are no rows.
        """
        from copy import deepcopy

        fitted = self.ranker.intercepts is None or bool(self.ranker.intercepts.any())
        if intercepts and validation is None and not fitted:
            raise GatesError(
                "the network gets its intercepts from validation rows, and none were given: call "
                "served(rows), or served(intercepts=False) to leave them at 0"
            )
        ranker = deepcopy(self.ranker).eval()
        if self.average is not None:
            self.average.copy_to(self._dense(ranker))
        if validation is not None and ranker.intercepts is not None:
            calibrate(ranker, validation)
        return ranker

    @property
    def _ddp_params_and_buffers_to_ignore(self) -> list[str]:
        """Tables that exchange gradients by themselves; read by ``DistributedDataParallel``."""
        return spread_names(self)

    def _dense(self, ranker: Ranker | None = None) -> dict[str, Tensor]:
        """Return the parameters by name, tables aside."""
        ranker = self.ranker if ranker is None else ranker
        dense = {id(parameter) for parameter in ranker.dense_parameters()}
        return {name: p for name, p in ranker.named_parameters() if id(p) in dense}

    def _prior_dim(self, transform: Transform) -> dict[str, int]:
        """Return the option that a network with a prior needs, if it is not given."""
        if not self.prior or "prior_dim" in self.options:
            return {}
        if "prior_dim" not in options_of(self.net):
            raise GatesError(
                f"{self.net} takes no prior, but prior names {', '.join(self.prior)}: leave it "
                "out, or choose a network that does"
            )
        sizes = transform.schema, transform.sizes, transform.dense_width
        layer = InputLayer(*sizes, encoders=self.encoders, device="meta")
        return {"prior_dim": len(layer.columns(self.prior))}

    def _logs_this_step(self) -> bool:
        every = self.trainer.log_every_n_steps  # type: ignore[attr-defined]
        return bool(every) and (self.global_step + 1) % every == 0

    def _log_tasks(self, name: str, values: Tensor) -> None:
        for task, value in zip(self.ranker.schema.task_names, values, strict=True):
            self.log(f"{name}_{task}", value)

    def _log_metrics(self, stage: str) -> None:
        assert self.scored is not None
        self._swap.close()
        for name, value in self.scored.metrics().items():
            # equal on all ranks, each of which has seen the rows of all
            self.log(f"{stage}/{name}", value, prog_bar=name == "loss", sync_dist=True)
        self.scored = None
