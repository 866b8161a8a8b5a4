"""What the studies on pairs of digits share: training, trials, comparison, and what gates do."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Any, NamedTuple, get_args

import lightning as L
import numpy as np
import torch
from torch import Tensor, nn

from core_gates import GateMonitor
from core_gates.errors import GatesError
from harness.evidence import Resamples, Row, compare, moments
from harness.experiment import Arrays, Job, Piece, Run
from harness.files import Data
from harness.report.sections import save_gates
from studies.digits.multi_digits import MultiDigits, Pairs, Part, glyphs, pairs
from studies.digits.two_digit_network import CLASSES, DIM, HIDDEN, TASKS, TwoDigitNetwork, right

NETWORKS = "networks"
ACCURACY, SECONDS = "mean accuracy", "CPU seconds of training"
TASK_ACCURACY = ("accuracy, upper left", "accuracy, lower right")
UNROUTED = "pairs without an expert"  # percent
VALIDATION, TEST = 1, 2  # seeds of their pairs
TUNED_OPTIONS, TUNED_LOSSES = ("gamma",), ("entropy",)
SECONDS_A_STEP = 0.011  # of one core, with most gates


@dataclass(frozen=True)
class Training:
    """What is trained, and how long.

    Args:
        steps: Optimizer steps of a training.
        batch: Pairs of a step.
        learning_rate: Rate of Adam, where it is not tuned.
        experts: Number of experts, two at least.
        glyphs: Glyphs to train with, to choose by and to test with.
        scored: Pairs of glyphs held out that are drawn to choose by, and as many to test with.
    """

    steps: int = 480
    batch: int = 512
    learning_rate: float = 1e-3
    experts: int = 8
    glyphs: tuple[int, ...] = (1100, 300, 397)
    scored: int = 4096

    def settings(self) -> dict[str, Any]:
        """Check the settings that determine results, and return them.

        Raises:
            GatesError: A number is out of range, or a part has no glyphs.
        """
        if min(self.steps, self.batch, self.scored) < 1 or not 0 < self.learning_rate < np.inf:
            raise GatesError(
                f"--steps is {self.steps}, --batch {self.batch}, --scored {self.scored} and "
                f"--learning_rate {self.learning_rate}, expected positive numbers"
            )
        if self.experts < 2:
            raise GatesError(f"--experts is {self.experts}, expected two or more to choose from")
        glyphs("train", self.glyphs)
        return {**vars(self), "glyphs": list(self.glyphs)}


class Method(NamedTuple):
    """What is trained under a name.

    Attributes:
        gate: Class of its gates.
        options: Of them, see `studies.digits.gate_recipes.build_gate`.
        losses: Auxiliary losses with their weights.
        k: Experts of a pair that it may use; None for any number.
        stop: Steps after which its training is stopped early; None for none.
    """

    gate: str
    options: Mapping[str, Any]
    losses: Mapping[str, float]
    k: int | None = None
    stop: int | None = None

    @property
    def settings(self) -> dict[str, Any]:
        """Settings of a piece."""
        return dict(self._asdict())


def network_of(piece: Piece) -> TwoDigitNetwork:
    """Return an untrained network by the settings of a piece; what was tuned comes first."""
    options, losses = dict(piece.get("options", {})), dict(piece.get("losses", {}))
    options |= {name: piece[name] for name in TUNED_OPTIONS if piece.get(name) is not None}
    losses |= {name: piece[name] for name in TUNED_LOSSES if piece.get(name) is not None}
    if "search" in options:
        tuned = {"steps": piece.get("search_steps"), "start": piece.get("search_start")}
        search_settings = {name: value for name, value in tuned.items() if value is not None}
        options["search"] = {**options["search"], **search_settings}
    return TwoDigitNetwork(
        piece["gate"], options, losses, learning_rate=piece["learning_rate"],
        num_steps=piece["steps"], num_experts=piece["experts"],
    )  # fmt: skip


def scored_pairs(settings: Mapping[str, Any], part: int) -> Pairs:
    """Return the pairs that all networks are scored on."""
    name = "validation" if part == VALIDATION else "test"
    return pairs(glyphs(name, tuple(settings["glyphs"])), settings["scored"], (0, part))


def trained(piece: Piece, job: Job) -> TwoDigitNetwork:
    """Train one network, as far as the setting ``stop`` where there is one."""
    begin = time.process_time()
    L.seed_everything(piece.seed, verbose=False)
    network = network_of(piece)
    data = MultiDigits(tuple(piece["glyphs"]), piece["steps"], piece["batch"], piece.seed or 0)
    job.fit(network, data, max_epochs=1, max_steps=piece.get("stop", piece["steps"]))
    job.note(cpu={"seconds": round(time.process_time() - begin, 2)})
    return network


def train(piece: Piece, job: Job) -> dict[str, Tensor]:
    """Train one network; its weights are the result."""
    return dict(trained(piece, job).state_dict())


def trial(piece: Piece, job: Job) -> dict[str, float]:
    """Return the error on the validation pairs, active experts, and those beyond ``k``."""
    network = trained(piece, job)
    pairs, batch = scored_pairs(piece.settings, VALIDATION), piece["batch"]
    hits, active = right(network, pairs, batch), measured(network, pairs, batch)["active experts"]
    excess = max(0.0, active - piece["k"]) if piece.get("k") is not None else 0.0
    return {"score": 1 - float(hits.double().mean()), "active": active, "excess": excess}


class Comparison:
    """Networks of several methods, scored on the same test pairs.

    Args:
        run: Keeps what is trained.
        methods: By name.
        seeds: Seeds of every method, separated by commas.
    """

    def __init__(self, run: Run, methods: Mapping[str, Method], seeds: Sequence[int]) -> None:
        self.run, self.methods, self.seeds = run, methods, seeds
        self.test, self.batch = scored_pairs(run.settings, TEST), run.settings["batch"]
        self.store = run.store(NETWORKS, Arrays())
        self.networks: dict[str, list[TwoDigitNetwork]] = {}

    def obtain(
        self,
        settings: Mapping[str, Mapping[str, Any]] | None = None,
        keys: Mapping[str, str] | None = None,
    ) -> list[Piece]:
        """Train what is missing, and load every network.

        Args:
            settings: Of a method, beyond its own, such as what was tuned.
            keys: What tells these networks from others of the methods.
        """
        wanted = [
            self.run.piece(
                name, seed, keys, **{**method.settings, **(settings or {}).get(name, {})}
            )
            for name, method in self.methods.items()
            for seed in self.seeds
        ]
        trained = self.run.obtain(self.store, wanted, train)
        for piece in trained:
            network = network_of(piece)
            network.load_state_dict(self.store.load(piece))
            self.networks.setdefault(piece.method, []).append(network.eval())
        return trained

    def rows(self, task: str, reference: str | None = None) -> list[Row]:
        """Return accuracies with intervals over glyphs, and differences from a method."""
        scores = {
            name: [
                _accuracies(right(network, self.test, self.batch).double().numpy())
                for network in seed_networks
            ]
            for name, seed_networks in self.networks.items()
        }
        draws = Resamples.crossed(self.test.glyphs.numpy())
        return compare(
            scores, draws, task=task, reference=reference if reference in scores else None
        )

    def gate_rows(self, pieces: Sequence[Piece], task: str, *, kept: bool = True) -> list[Row]:
        """Return rows on how the gates route the test pairs, means over seeds.

        Args:
            pieces: Of the networks.
            task: Name of the rows.
            kept: Whether the report shows the gates of the first task and seed.
        """
        rows = []
        first = {
            n.replace(".", "_"): seed_networks[0].gates[0]
            for n, seed_networks in self.networks.items()
        }
        shown = GateMonitor(nn.ModuleDict(first))
        for name, networks in self.networks.items():
            figures = [measured(network, self.test, self.batch) for network in networks]
            costs = [
                self.store.record(piece).facts["cpu"]["seconds"]
                for piece in pieces
                if piece.method == name
            ]
            for metric in figures[0]:
                value = float(np.mean([seed_figures[metric] for seed_figures in figures]))
                rows.append(Row(name, task, metric, value, n=len(figures)))
            rows.append(Row(name, task, SECONDS, float(np.mean(costs)), n=len(costs)))
        if kept and first:
            save_gates(shown, self.run.folder)
        shown.close()
        return rows

    def data(self) -> list[Data]:
        """Describe the glyphs."""
        return [
            Data(
                "digits of scikit-learn", part,
                sha256(labeled.images.tobytes() + labeled.labels.tobytes()).hexdigest(),
                len(labeled.labels), "glyphs",
            )
            for part in get_args(Part)
            for labeled in [glyphs(part, tuple(self.run.settings["glyphs"]))]
        ]  # fmt: skip


def measured(network: TwoDigitNetwork, test: Pairs, batch: int = 512) -> dict[str, float]:
    """Return the accuracy, routing and cost of a network on pairs, by name.

    Returns:
        ``active experts`` of a gate; ``load CV``, NaN if a gate is closed; ``entropy`` of a pair in
        nats, NaN without probabilities; ``pairs without an expert``, in percent, of the worse gate;
        ``kFLOPs`` per pair, of gates, the experts that either of them uses, and heads.
    """
    used, mixed = [], 0.0
    with GateMonitor(network.gates) as monitor, torch.no_grad():
        for x, ids in zip(test.x.split(batch), test.ids.split(batch), strict=True):
            routings = [gate(x, ids=ids) for gate in network.gates]
            dense = [routing.to_dense(network.weight.shape[0]).weights != 0 for routing in routings]
            experts = torch.stack(dense).any(0).sum(-1).double()
            if routings[0].dispatch is not None:  # experts work on slots
                slots = routings[0].weights[0].numel()
                experts = torch.full_like(experts, TASKS * slots / len(x))
                mixed = TASKS * slots * float(DIM + HIDDEN)
            used.append(experts)
    figures = list(monitor.compute().values())
    of_gates = sum(
        parameter.numel()
        for name, parameter in network.gates.named_parameters()
        if parameter.ndim > 1 and "permutation" not in name
    )
    experts_used = float(torch.cat(used).mean()) * DIM * HIDDEN
    return {
        "active experts": float(np.mean([seed_figures["active"] for seed_figures in figures])),
        "load CV": float(
            np.mean([seed_figures.get("load_cv", np.nan) for seed_figures in figures])
        ),
        "entropy": float(
            np.mean([seed_figures.get("entropy", np.nan) for seed_figures in figures])
        ),
        UNROUTED: 100 * max(seed_figures["unrouted"] for seed_figures in figures),
        "kFLOPs": 2e-3 * (experts_used + mixed + of_gates + TASKS * HIDDEN * CLASSES),
    }


def _accuracies(hits: np.ndarray) -> Any:
    """Return accuracies of both tasks and their mean, under weights of pairs."""
    parts = [moments(hits[:, task], name=TASK_ACCURACY[task]) for task in range(TASKS)]
    parts.append(moments(hits.mean(1), name=ACCURACY))
    return lambda weights: {k: v for part in parts for k, v in part(weights).items()}
