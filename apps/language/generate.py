"""``gates language generate``: continue prompts, streamed to the terminal."""

from pathlib import Path

import language
from core_gates.errors import GatesError
from harness.command.verbs import Place
from harness.files.piece import read_record, refuse_changed
from language.generation import generate as continued
from language.hf.model_folder import CONFIG, read_marks, read_model

SHIPPED = "shipped"
SHIPPED_CONFIG = "long"  # whose decoder ships
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
) -> None:
    """Continue a prompt, or every line of a file, and print the text as it is made.

    Args:
        place: Filled in by the command line.
        prompt: Text that is continued.
        prompts: File with one prompt per line, of any lengths; all are continued together.
        weights: Folder of a model, as ``fit``, ``convert`` or transformers write it, or
            ``shipped``; what the run has trained if null.
        max_tokens: The most tokens that are added to a prompt.
        temperature: Scale of the randomness; 0 always takes the most likely token.
        top_k: Keep the k most likely tokens only; all if null.
        top_p: Keep the most likely tokens that together have this probability; all if null.
        stop: Text after which a continuation ends.
        seed: Seed of all random choices.
    """
    texts = prompts_of(prompt, prompts)
    folder = folder_of(place, weights)
    model, tokenizer = read_model(folder)
    if tokenizer is None:
        raise GatesError(f"{folder} has no tokenizer.json: put that of the model into the folder")
    begin, ends = read_marks(folder)
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
    if prompt is not None:
        print(prompt, end="", flush=True)
        try:
            for chunk in chunks:
                print(chunk.text, end="", flush=True)
        finally:  # an error has its own line
            print()
        return
    whole = [""] * len(texts)
    for chunk in chunks:  # a text is printed when it is complete
        whole[chunk.prompt] += chunk.text
        if chunk.reason is not None:
            print(f"[{chunk.prompt + 1}] {texts[chunk.prompt]}{whole[chunk.prompt]}", flush=True)


def prompts_of(prompt: str | None, path: str | None) -> list[str]:
    """Return the prompts: the one, or the lines of a file.

    Raises:
        GatesError: Neither is given, or both; or the file is not text, or has an empty line.
    """
    if (prompt is None) == (path is None):
        raise GatesError("give either --prompt TEXT or --prompts FILE")
    if path is None:
        return [str(prompt)]
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").removesuffix("\n").split("\n")
    except UnicodeDecodeError as error:
        raise GatesError(f"{path} is not text in UTF-8: give one prompt per line") from error
    if not lines or not all(lines):
        empty = lines.index("") + 1 if lines else 1
        raise GatesError(f"{path}, line {empty} is empty: give a prompt on every line")
    return lines


def shipped() -> Path:
    """Return where the decoder that ships is, if there is one."""
    return Path(language.__file__).parent / "weights" / SHIPPED_CONFIG


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
    found = models_in(homes[weights]) if weights in homes else [Path(str(weights))]
    if not found:
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
    if weights in homes and (record := read_record(found[0])) is not None:
        refuse_changed(found[0], record)
    return found[0]
