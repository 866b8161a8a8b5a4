"""What texts cost after their beginning was compressed: attention sinks, in nats per token."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch

from apps.language.diagnose import beginnings, require_documents
from apps.language.scbench.asking import FULL, loaded
from apps.language.seer.distill import digest_of
from harness.evidence import Resamples, Row, compare, moments
from harness.experiment import Figures, Job, Piece, Run
from language.corpus import read_corpus
from language.hf.pretrained import Pretrained
from language.scbench.policies.base import KVPolicy
from language.scbench.policies.registry import policy_of
from language.scbench.runner import loss_after
from language.tokenizer import load_tokenizer

LOSSES, LOSS = "losses", "loss, nats per token"
TASK = "loss after compression"


@dataclass(frozen=True)
class Texts:
    """Texts whose beginnings StreamingLLM compresses.

    Attributes:
        texts: Texts whose loss is measured after StreamingLLM; none if 0.
        tokens: Tokens of a text.
        prompt: Its first tokens, which are compressed.
        window: Last tokens of the prompt that are kept.
        sinks: First tokens that are kept as well, each number a policy.
    """

    texts: int = 0
    tokens: int = 640
    prompt: int = 512
    window: int = 128
    sinks: tuple[int, ...] = (0, 4)

    def policies(self) -> dict[str, KVPolicy]:
        """Return the policies by name."""
        found = {FULL: policy_of(FULL)}
        for sinks in self.sinks:
            keep = (self.window + sinks) / self.prompt
            found[label_of(sinks)] = policy_of("streaming", sinks=sinks, keep=keep)
        return found


def label_of(sinks: int) -> str:
    """Return the name of StreamingLLM with a number of sinks."""
    return f"streaming, {sinks} sinks"


def rows_of_loss(run: Run, texts: Texts, folder: str, model: str) -> list[Row]:
    """Return the losses of all policies, and their differences from full.

    Args:
        run: Keeps what is measured.
        texts: Which are read, of the held-out documents of the standard library.
        folder: Of the model.
        model: Its name.
    """
    found = loaded(folder)
    opened = Pretrained(found.model, load_tokenizer(folder), Path(folder), found.context)
    opened.require_context(texts.tokens)
    documents = read_corpus(["python"]).part("test")
    names, sequences = beginnings(opened, documents, texts.tokens, texts.texts)
    require_documents(names, texts.tokens)
    policies = texts.policies()
    options = {label: asdict(policy) for label, policy in policies.items()}
    settings = {"weights": found.digest, "prompt": texts.prompt, "policies": options}
    pieces = [
        Piece(model, None, {"n": n}, {**settings, "tokens": digest_of(ids)})
        for n, ids in enumerate(sequences)
    ]
    store = run.store(LOSSES, Figures())
    work = partial(measure, folder=folder, policies=policies, sequences=sequences)
    run.obtain(store, pieces, work, scoring=True)
    losses = [store.load(piece) for piece in pieces]
    scores = {
        label: [moments(np.array([one[label] for one in losses]), name=LOSS)] for label in policies
    }
    return compare(scores, Resamples.clusters(names), task=f"{model}, {TASK}", reference=FULL)


def measure(
    piece: Piece,
    job: Job,
    folder: str,
    policies: Mapping[str, KVPolicy],
    sequences: Sequence[Sequence[int]],
) -> dict[str, float]:
    """Return the loss of a text after its prompt, in nats per token, by policy."""
    del job
    tokens = torch.tensor(sequences[int(piece.keys["n"])])
    model = loaded(folder).model
    return {
        label: loss_after(model, policy, tokens, piece["prompt"])
        for label, policy in policies.items()
    }
