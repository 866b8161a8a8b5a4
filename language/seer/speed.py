"""From which length of a cache on block gates decode faster, measured once for a model."""

import json
import time
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache

from core_gates.attention.seer.decode import BlockSelector
from core_gates.errors import GatesError
from harness.files import write_json
from language.hf.gate_file import fingerprint
from language.hf.locate import base_of
from language.seer.attach import EVERY, block_cache, block_gates, choose_blocks, detached
from language.seer.kept import recent_blocks

LENGTHS = (256, 512, 1024, 2048, 4096, 8192)
STOCK, EVERYTHING, GATES = WAYS = "stock", "everything", "gates"
BUDGET = 512
"""Tokens that gates read while they are timed."""

ROUNDS, NEVER = 5, 2**31
DEFAULT = 4096
"""Tokens of a cache below which a model that was not timed reads everything."""


def token_milliseconds(model: nn.Module, length: int) -> dict[str, float]:
    """Return the milliseconds of a token after a cache of random keys, by what is read.

    They are medians of rounds in which the model without gates (`STOCK`), all blocks (`EVERYTHING`)
    and `BUDGET` tokens (`GATES`) take turns of two choices each.

    Args:
        model: With gates for decoding, in evaluation mode.
        length: Tokens of the cache.
    """
    whole: Any = model
    base, gates = base_of(model), block_gates(model)
    first = next(iter(gates.values())).gate
    plain, blocks = DynamicCache(config=whole.config), block_cache(model)
    weight = next(model.parameters())
    for gate in gates.values():
        k, v = weight.new_empty(2, 1, gate.gate.num_kv_heads, length, first.head_dim).normal_()
        plain.update(k, v, gate.layer)
        blocks.update(k, v, gate.layer)
    blocks.turn(base.rotary_emb(weight, torch.arange(length, device=weight.device)[None]), 1)
    token = torch.zeros(1, 1, dtype=torch.long, device=weight.device)

    def timed(cache: Any) -> float:
        begun = time.perf_counter()
        for _ in range(2 * EVERY):
            int(whole(token, cache=cache).logits.argmax())
        spent = time.perf_counter() - begun
        cache.crop(-2 * EVERY)
        return 1000 * spent / (2 * EVERY)

    size = first.block_size
    number = max(3, BUDGET // size)
    rule = BlockSelector(k=number, sinks=1, recent=recent_blocks(number))
    turns: dict[str, list[float]] = {name: [] for name in WAYS}
    with torch.inference_mode():
        for _ in range(1 + ROUNDS):
            with detached(model):
                turns[STOCK].append(timed(plain))
            for name, dense_below in ((EVERYTHING, 2 * length), (GATES, 0)):
                choose_blocks(model, rule, dense_below=dense_below)
                turns[name].append(timed(blocks))
    return {name: median(values[1:]) for name, values in turns.items()}


def faster_from(times: Mapping[int, Mapping[str, float]]) -> int | None:
    """Return the least length from which on gates are faster than all else; None for none.

    Args:
        times: Of every length what `token_milliseconds` returned.
    """
    lengths = sorted(times)
    slower = [n for n in lengths if times[n][GATES] >= min(times[n][STOCK], times[n][EVERYTHING])]
    return next((n for n in lengths if not slower or n > slower[-1]), None)


def _path(folder: Path, model: nn.Module) -> Path:
    return folder / f"decoding-{fingerprint(model)}.json"


def write_speed(
    folder: Path, model: nn.Module, times: Mapping[int, Mapping[str, float]]
) -> tuple[Path, int | None]:
    """Write times of a model where `dense_below` looks for them; return the file and `faster_from`.

    Raises:
        GatesError: It cannot be written.
    """
    start = faster_from(times)
    content = {"dense_below": start, "budget": BUDGET, "milliseconds": times}
    return write_json(_path(folder, model), content), start


def dense_below(folder: Path, model: nn.Module, budget: int | None) -> int:
    """Return the tokens of a cache below which a model reads everything while it decodes.

    That is what `write_speed` has written, or `DEFAULT`; more by as much as a budget is larger than
    that of the times, so that gates that read more are not slower either.

    Args:
        folder: Of the file.
        model: The base model.
        budget: Tokens that the rule reads; None where it has no such number.

    Raises:
        GatesError: The file is damaged.
    """
    path, least = _path(folder, model), DEFAULT
    if path.exists():
        try:
            least = json.loads(path.read_text())["dense_below"]
            least = NEVER if least is None else int(least)
        except (KeyError, TypeError, ValueError) as error:
            raise GatesError(
                f"{path} is damaged: run `gates language diagnose --speed` again"
            ) from error
    return -(-least * max(budget or 0, BUDGET) // BUDGET)
