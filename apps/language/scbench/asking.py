"""Answers of a model to the questions of rows: a piece of work for each policy, mode and row."""

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from functools import cache, cached_property, partial
from itertools import chain, product
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml

from core_gates.errors import GatesError, check_option
from harness.experiment import Figures, Job, Piece, Run, Store
from harness.files import Data, short_digest
from harness.system import MemoryMeter, return_freed_memory
from language.hf.gate_file import weights_digest
from language.hf.locate import require_transformers
from language.hf.pretrained import in_one_line, open_model
from language.scbench.policies.base import KVPolicy
from language.scbench.policies.registry import POLICIES, policy_of
from language.scbench.prompts import Mode, conversation
from language.scbench.retriever import retriever, retriever_tokenizer
from language.scbench.row import TASKS, Row
from language.scbench.row_files import read_rows, write_rows
from language.scbench.runner import Answering, ends_of
from language.scbench.tasks import generate

ANSWERS, ROWS = "answers", "rows"
RETRIEVER, FULL, KEEP = "retriever", "full", "keep"
VERSION = 1  # of what is asked and answered
SAMPLED = 0.1  # seconds between two samples of the memory


@dataclass(frozen=True)
class Questions:
    """What a model is asked, and by which policies of its cache.

    Args:
        task: Tasks of SCBench, such as ``kv``.
        mode: ``turns``, where a question follows those before with their answers, and
            ``requests``, where it follows the context alone.
        policy: Policies, each a name or ``name:option=value:option=value``; ``full`` is added.
        keep: Fractions of the tokens that are kept, for policies that have this option; 0.5 if
            null.
        length: Tokens of a generated context, such as ``2k``, 2,048, which is the default. With
            ``data``, the most that the model reads, questions and answers included: the middle of
            a longer context is left out.
        rows: Contexts of a task.
        data: Folder of the published files, such as scbench_kv.jsonl, whose lines have an ``id``, a
            ``context`` and ``multi_turns`` of ``input`` and ``answer``; contexts are generated if
            null.
        words: The keys of ``kv`` are common words and its values numbers, for small models.
        chat: Prompts have the chat template of the tokenizer, if it has one.
        new_tokens: Most tokens of an answer; those of the task if null.
        own_answers: Turns follow the answers of the model instead of the right ones.
        seed: Of generated contexts.
    """

    task: tuple[str, ...] = ("kv",)
    mode: tuple[Mode, ...] = ("turns", "requests")
    policy: tuple[str, ...] = (FULL, "streaming", "snapkv", "kivi:bits=4")
    keep: tuple[float, ...] | None = None
    length: str | None = None
    rows: int = 20
    data: str | None = None
    words: bool = False
    chat: bool = True
    new_tokens: int | None = None
    own_answers: bool = False
    seed: int = 0

    def check(self) -> None:
        """Refuse what does not exist, and values out of range.

        Raises:
            GatesError: Something is wrong.
        """
        for name in self.task:
            check_option("task", name, TASKS, GatesError)
        fewest = 3 if self.new_tokens is None else self.new_tokens
        if not self.asked or self.rows < 1 or fewest < 3:
            raise GatesError(
                f"--task is {list(self.task)}, --mode {list(self.mode)}, --rows {self.rows} and"
                f" --new_tokens {self.new_tokens}: expected tasks, modes, rows from 1, and answers"
                " of 3 tokens at least, as the first one is read before the cache is compressed"
            )
        if self.words and self.data:
            raise GatesError(
                "--words is of generated contexts, and --data gives others: leave one out"
            )
        self.policies()

    @property
    def asked(self) -> list[tuple[str, Mode]]:
        """The tasks and modes, each pair once."""
        return [*dict.fromkeys(product(self.task, self.mode))]

    @property
    def tokens(self) -> int | None:
        """The length as a number; k is 1,024.

        Raises:
            GatesError: It is not a number.
        """
        if self.length is None:
            return 2048 if self.data is None else None
        match = re.fullmatch(r"([1-9]\d*)(k?)", self.length)
        if match is None:
            raise GatesError(f"--length is {self.length!r}, expected tokens such as 300 or 2k")
        return int(match[1]) * (1024 if match[2] else 1)

    def policies(self) -> dict[str, KVPolicy]:
        """Return the policies by their names in tables, ``full`` first, each once.

        Raises:
            GatesError: One does not exist, has no such option, has one twice, or keeps more for
                certain than it may of a context.
        """
        found: dict[str, KVPolicy] = {FULL: policy_of(FULL)}
        for text in self.policy:
            name, *pairs = re.split(r":(?=\w+=)", text)  # a path may have colons
            options = {
                pair.partition("=")[0]: yaml.safe_load(pair.partition("=")[2]) for pair in pairs
            }
            check_option("policy", name, POLICIES, GatesError)
            if len(options) < len(pairs):
                raise GatesError(
                    f"--policy has {text!r}, where an option occurs twice: give it once"
                )
            kept = KEEP in {field.name for field in fields(POLICIES[name])} - options.keys()
            for keep in (self.keep or (0.5,)) if kept else (None,):
                own = options if keep is None else {KEEP: keep, **options}
                label = ":".join([name, *(f"{key}={value}" for key, value in own.items())])
                if (policy := policy_of(name, **own)) not in found.values():
                    found[label] = policy
                if self.tokens and not policy.exact:
                    policy.require(self.tokens)
        if self.keep and not any(hasattr(policy, KEEP) for policy in found.values()):
            raise GatesError(f"--keep is given, and none of {', '.join(found)} has this option")
        return found


class Loaded(NamedTuple):
    """A model that answers.

    Attributes:
        model: A causal language model of transformers.
        tokenizer: Its tokenizer, of transformers.
        digest: Of its weights.
        context: Most tokens that it reads; None where nothing limits them.
    """

    model: Any
    tokenizer: Any
    digest: str
    context: int | None


@cache
def loaded(name: str) -> Loaded:
    """Open a model, once in a process.

    Args:
        name: Its folder, or ``retriever``.
    """
    if name == RETRIEVER:
        model: Any = retriever()
        tokenizer = retriever_tokenizer()
    else:
        model, auto = open_model(name), require_transformers().AutoTokenizer
        with in_one_line(f"the tokenizer of {name} cannot be opened", "get the folder again"):
            tokenizer = auto.from_pretrained(name, local_files_only=True, trust_remote_code=False)
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    digest, device = weights_digest(model), "cuda" if torch.cuda.is_available() else "cpu"
    return Loaded(model.to(device), tokenizer, digest, context)


class Asking:
    """Questions to one model, whose answers are kept in a run.

    Args:
        run: Keeps them.
        asked: What is asked.
        folder: Of the model, or ``retriever``.
        name: Of the model, where a run has several.

    Raises:
        GatesError: A context is longer than the model reads.
    """

    def __init__(self, run: Run, asked: Questions, folder: str, name: str = "") -> None:
        self.run, self.asked, self.folder, self.name = run, asked, folder, name
        self.loaded, self.policies = loaded(folder), asked.policies()
        self.store: Store[dict[str, Any]] = run.store(ANSWERS, Figures())
        limit, tokens = self.loaded.context, asked.tokens
        if limit is not None and tokens is not None and tokens > limit:
            raise GatesError(
                f"--length is {tokens} tokens, {Path(folder).name} reads at most {limit}: give less"
            )

    @cached_property
    def rows(self) -> dict[str, list[Row]]:
        """The rows of every task."""
        return {task: self._rows(task) for task in self.asked.task}

    def _rows(self, task: str) -> list[Row]:
        asked = self.asked
        if asked.data is not None:
            rows = read_rows(Path(asked.data), task)
            if len(rows) < asked.rows:
                raise GatesError(
                    f"{asked.data} has {len(rows)} rows of {task}, --rows is {asked.rows}"
                )
            return rows[: asked.rows]
        form = "words" if asked.words and task == "kv" else "uuid"
        form = "symbols" if self.folder == RETRIEVER else form
        length = asked.tokens or 0
        return generate(task, asked.rows, length, asked.seed, self.loaded.tokenizer, form)

    def files(self) -> dict[str, str]:
        """Return the file of the rows of each task; generated rows are written if they are not."""
        if self.asked.data is not None:
            return dict.fromkeys(self.rows, self.asked.data)
        files = {}
        for task, rows in self.rows.items():
            digest = short_digest([digest_of(row) for row in rows], 8)
            path = self.run.folder / ROWS / f"{task}-{digest}.jsonl"
            if not path.is_file():
                write_rows(path, rows)
            files[task] = str(path)
        return files

    def data(self) -> list[Data]:
        """Return what answers are based on: the model, and the rows of each task."""
        of = self.name or Path(self.folder).name
        size = sum(weight.numel() for weight in self.loaded.model.parameters())
        digests = {task: [digest_of(row) for row in rows] for task, rows in self.rows.items()}
        rows = [
            Data(f"{task} of {of}", "test", short_digest(rows, 64), len(rows), "rows")
            for task, rows in digests.items()
        ]
        return [Data(of, "model", self.loaded.digest, size, "weights"), *rows]

    def settings(self, task: str, mode: Mode) -> dict[str, Any]:
        """Return what decides the answers to all rows of a task."""
        asked = self.asked
        shorter = asked.tokens if asked.data is not None else None
        return {
            "weights": self.loaded.digest,
            "mode": mode,
            "task": task,
            "context": shorter or self.loaded.context,
            "new_tokens": asked.new_tokens,
            "chat": None if asked.chat else False,
            "own_answers": asked.own_answers and mode == "turns",
            "version": VERSION,
        }

    def pieces(self, task: str, mode: Mode) -> dict[str, list[Piece]]:
        """Return the pieces of a task in a mode by policy, one for each row."""
        keys = {"of-": self.name} if self.name else {}
        return {
            label: [
                Piece(
                    label,
                    keys={**keys, "task-": task, "mode-": mode, "row": row.id},
                    settings={
                        **self.settings(task, mode),
                        **policy.settings(),
                        "content": digest_of(row),
                    },
                )
                for row in self.rows[task]
            ]
            for label, policy in self.policies.items()
        }

    def obtain(self, *asked: tuple[str, Mode]) -> None:
        """Ask what was not answered yet, of some tasks and modes.

        Raises:
            SettingsDiffer: An answer was given by another model, or to another row.
        """
        of = [self.pieces(*one) for one in asked]
        every = [piece for pieces in of for some in pieces.values() for piece in some]
        files = self.files() if self.store.missing(every) else {}
        for policy in self.policies.values() if files else ():
            policy.make_cache(self.loaded.model)  # refuses what does not fit before others answer
        work = partial(answer, folder=self.folder, files=files)
        self.run.obtain(self.store, every, work, scoring=True)


def answer(piece: Piece, job: Job, folder: str, files: Mapping[str, str]) -> dict[str, Any]:
    """Return the answers to the questions of one row; what they took is a fact of the record."""
    found, mode = loaded(folder), piece["mode"]
    row = rows_in(files[piece["task"]], piece["task"])[int(piece.keys["row"])]
    asked = conversation(
        row, found.tokenizer, mode, max_length=piece.get("context"),
        own_answers=piece["own_answers"], chat=piece.get("chat", True),
    )  # fmt: skip
    if asked.truncated and row.origin != "file":
        raise GatesError(
            f"context, questions and answers are {asked.truncated} tokens longer than the"
            f" {piece['context']} that the model reads: give a smaller --length"
        )
    size = found.model.get_input_embeddings().weight.shape[0]
    if (last := max(chain(asked.context, *asked.questions, *asked.golden))) >= size:
        raise GatesError(
            f"the tokenizer has token {last}, the model has {size}: get both of the same folder"
        )
    if most := piece.get("new_tokens"):
        asked = replace(asked, new_tokens=tuple(min(most, n) for n in asked.new_tokens))
    policy = policy_of(**piece["policy"])
    answering = Answering(found.model, policy, ends_of(found.model, found.tokenizer))
    return_freed_memory()
    with MemoryMeter(every=SAMPLED) as meter:
        start = meter.sample()
        tokens, cost = answering.answers(asked, mode, own_answers=piece["own_answers"])
    peak = meter.peak - start
    if found.model.device.type == "cuda":
        peak = torch.cuda.max_memory_allocated()
        torch.cuda.reset_peak_memory_stats()
    job.note(cost={**asdict(cost), "peak_bytes": peak, "truncated": asked.truncated})
    texts = [found.tokenizer.decode(one, skip_special_tokens=True) for one in tokens]
    return {"answers": texts, "tokens": tokens}


@cache
def rows_in(path: str, task: str) -> dict[int, Row]:
    """Return the rows of a file by their numbers, read once in a process."""
    return {row.id: row for row in read_rows(Path(path), task)}


def digest_of(row: Row) -> str:
    """Return a digest of a row."""
    return short_digest(asdict(row))
