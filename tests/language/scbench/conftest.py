"""Tokenizers that need no files."""

from pathlib import Path

import pytest


def of(model, trained_on=()):
    from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if trained_on:
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(
            vocab_size=600, initial_alphabet=alphabet, show_progress=False
        )
        tokenizer.train_from_iterator(trained_on, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


@pytest.fixture(scope="session")
def byte_tokenizer():
    """A token for each byte of a text."""
    from tokenizers import models, pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    return of(models.BPE({letter: number for number, letter in enumerate(letters)}, []))


@pytest.fixture(scope="session")
def merging_tokenizer():
    """Tokens of one or several bytes, as those of a language model."""
    import textwrap

    from tokenizers import models

    return of(models.BPE(), [Path(textwrap.__file__).read_text()])
