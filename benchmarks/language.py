"""A training step and generation of our decoder, next to models of transformers of equal size.

Both have the same weights at first, the same tokens and the same fused AdamW. transformers chooses
its attention and its experts itself, as for any user.
"""

import importlib
import importlib.util
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.comparison import Call, Comparison, Load
from core_gates import StackedExperts, TopKGate

DIMS, LAYERS, HEADS, KV_HEADS, WIDER = (128, 256), 4, 4, 2, 3
VOCABULARY, CONTEXT, BATCH = 257, 256, 8
EXPERTS, K = 8, 2
PROMPT, ADDED, BATCHES = 64, 64, (1, 8)
ADAMW: dict[str, Any] = {"lr": 1e-4, "weight_decay": 0.1, "fused": True}
OURS, THEIRS = "ours", "transformers"
ABSENT = "transformers is not installed: pip install 'gatesuite[language]'"


class Family(NamedTuple):
    """Models of transformers.

    Attributes:
        qk_norm: Whether queries and keys are normalized.
        experts: Options of its configuration for experts; empty for a dense model.
        training_bar: The most time of our training step over that of theirs.
    """

    qk_norm: bool
    experts: Mapping[str, Any]
    training_bar: float


FAMILIES = {
    "Llama": Family(False, {}, 1 / 0.95),
    "Qwen3": Family(True, {}, 1 / 0.95),
    "Mixtral": Family(False, {"num_local_experts": EXPERTS}, 1 / 0.9),
    "Qwen3Moe": Family(True, {"num_experts": EXPERTS, "norm_topk_prob": True}, 1 / 0.9),
}
GENERATION_BAR = 1.0


def is_installed() -> bool:
    """Return whether the peer can be imported."""
    return importlib.util.find_spec("transformers") is not None


def comparisons() -> Iterator[Comparison]:
    """Training steps, then generation, of all families and sizes; on one CPU thread."""
    for dim in DIMS:
        for name in FAMILIES:
            yield training_step(name, dim)
    for dim in DIMS:
        for name in FAMILIES:
            for batch in BATCHES:
                yield generation(name, dim, batch)


def training_step(name: str, dim: int) -> Comparison:
    """Return a step of training of ours and of theirs."""

    def build(load: Load) -> Mapping[str, Call]:
        tokens = tokens_of(BATCH, CONTEXT + 1)
        return {which: step(*model, tokens) for which, model in pair(name, dim, load).items()}

    return _compared(
        f"training step of {name}, d {dim}, batch {BATCH}x{CONTEXT}", build,
        FAMILIES[name].training_bar, BATCH * CONTEXT,
    )  # fmt: skip


def generation(name: str, dim: int, batch: int) -> Comparison:
    """Return the most likely continuations of ours and of theirs."""

    def build(load: Load) -> Mapping[str, Call]:
        prompts, models = tokens_of(batch, PROMPT), pair(name, dim, load)
        ours = continued(load, models[OURS][0].eval(), prompts)
        if THEIRS not in models:
            return {OURS: ours}
        theirs: Any = models[THEIRS][0].eval()
        lengths = {"max_new_tokens": ADDED, "min_new_tokens": ADDED}

        def call() -> Tensor:
            generated: Tensor = theirs.generate(prompts, do_sample=False, pad_token_id=0, **lengths)
            return generated[:, PROMPT:]

        return {OURS: ours, THEIRS: call}

    return _compared(
        f"generation by {name}, d {dim}, batch {batch}, {PROMPT} + {ADDED} tokens", build,
        GENERATION_BAR, batch * ADDED,
    )  # fmt: skip


def _compared(
    name: str, build: Callable[[Load], Mapping[str, Call]], bar: float, tokens: int
) -> Comparison:
    return Comparison(
        name=name,
        op="language",
        build=build,
        baseline=THEIRS,
        bars={OURS: bar},
        units=dict.fromkeys((OURS, THEIRS), tokens),
        unit="token",
        rate="tokens/s",
        absent={} if is_installed() else {THEIRS: ABSENT},
        memory=2e9,
    )


def tokens_of(batch: int, length: int) -> Tensor:
    """Return tokens (B, T)."""
    draw = torch.Generator().manual_seed(0)
    return torch.randint(VOCABULARY - 1, (batch, length), generator=draw)


def pair(name: str, dim: int, load: Load) -> dict[str, tuple[nn.Module, Callable[[Any], Tensor]]]:
    """Return our model, and theirs if it is installed, each with what gives logits of its output.

    Args:
        name: Family.
        dim: Features of a token.
        load: Imports a module of the tree that is measured.
    """
    family = FAMILIES[name]
    mixture: dict[str, Any] = {}
    if family.experts:
        mixture["gate"] = partial(TopKGate, num_experts=EXPERTS, k=K)
        mixture["experts"] = partial(StackedExperts, hidden_dim=WIDER * dim)
    torch.manual_seed(0)
    ours = load("language.decoder").Decoder(
        VOCABULARY, dim, LAYERS, HEADS, KV_HEADS, hidden_dim=WIDER * dim, context=CONTEXT,
        qk_norm=family.qk_norm, **mixture,
    )  # fmt: skip
    models: dict[str, tuple[nn.Module, Callable[[Any], Tensor]]] = {OURS: (ours, lambda y: y)}
    if is_installed():
        transformers: Any = importlib.import_module("transformers")
        sizes: dict[str, Any] = {"vocab_size": VOCABULARY, "hidden_size": dim}
        sizes |= {"intermediate_size": WIDER * dim}
        sizes |= {"num_hidden_layers": LAYERS, "num_attention_heads": HEADS}
        sizes |= {"num_key_value_heads": KV_HEADS, "head_dim": dim // HEADS}
        sizes |= {"max_position_embeddings": PROMPT + CONTEXT, "rms_norm_eps": 1e-6}
        config = getattr(transformers, f"{name}Config")(
            **sizes, **family.experts, rope_parameters={"rope_type": "default", "rope_theta": 1e4},
            **({"num_experts_per_tok": K} if family.experts else {}),
            **({"moe_intermediate_size": WIDER * dim} if name == "Qwen3Moe" else {}),
        )  # fmt: skip
        theirs = getattr(transformers, f"{name}ForCausalLM")(config)
        ours.load_state_dict(theirs.state_dict())
        models[THEIRS] = theirs, lambda y: y.logits
    return models


def step(model: nn.Module, logits_of: Callable[[Any], Tensor], tokens: Tensor) -> Call:
    """Return a function that takes a step of training and returns the loss."""
    adamw = torch.optim.AdamW(model.train().parameters(), **ADAMW)

    def call() -> Tensor:
        logits = logits_of(model(tokens[:, :-1]))
        loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        adamw.zero_grad()
        loss.backward()
        adamw.step()
        return loss.detach()

    return call


def continued(load: Load, model: nn.Module, prompts: Tensor) -> Call:
    """Return a function that returns the tokens (B, T) that ours adds."""
    generate = load("language.generation").generate
    decode = load("language.tokenizer").ByteTokenizer().decode
    given = prompts.tolist()

    def call() -> Tensor:
        added: list[list[int]] = [[] for _ in given]
        for chunk in generate(
            model, given, decode=decode, max_tokens=ADDED, temperature=0.0, end=None
        ):
            added[chunk.prompt] += chunk.tokens
        return torch.tensor(added)

    return call
