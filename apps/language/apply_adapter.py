"""``gates language predict`` and ``export``: label texts with an adapter, and give it to PEFT."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import torch

from core_gates.errors import GatesError
from harness.command.verbs import refuse_existing, refuse_strangers
from language.adapt.adapter_training import FILE, TASK, outputs_of
from language.adapt.labeled_texts import texts_of_file
from language.hf.classifier import classifier_folder, encode_texts, open_classifier
from language.hf.lora import CONFIG, LABELS, WEIGHTS, export_lora, load_sora


class Adapted(NamedTuple):
    """A model with an adapter.

    Attributes:
        model: The model.
        folder: Of the model, with its tokenizer.
        classes: What its outputs mean; empty for a number.
        context: Tokens of a row at most.
        texts: Texts of a row.
    """

    model: Any
    folder: Path
    classes: list[str]
    context: int
    texts: int


def adapted(adapter: str, model: str) -> Adapted:
    """Return a model with an adapter that ``adapt`` has written.

    Raises:
        GatesError: The adapter is missing or damaged, or is one of another model.
    """
    place = Path(adapter) / TASK
    try:
        task = json.loads(place.read_text(encoding="utf-8"))
        classes = [str(one) for one in task["classes"]]
        context, texts = int(task["context"]), int(task["texts"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise GatesError(
            f"{place} is missing or damaged ({type(error).__name__}): give a folder that adapt has"
            " written, such as runs/language/minilm/adapters/sora-r8-s0"
        ) from error
    folder = classifier_folder(model)
    found = open_classifier(folder, len(classes) or 1)
    load_sora(found, Path(adapter) / FILE)
    return Adapted(found, folder, classes, context, texts)


def predict(
    adapter: str, input: str, model: str = "minilm", columns: tuple[str, ...] = ()
) -> None:  # fmt: skip
    """Label the texts of a file: a line with label, probability and texts for each, by tabs.

    Args:
        adapter: Folder that ``adapt`` has written.
        input: File with a text per line, or a table ``*.tsv`` or JSON lines as ``adapt`` reads
            them, whose labels are not used.
        model: The model that it was trained on, see ``adapt``.
        columns: Names of one or two columns of texts, and that of labels; known ones if empty.
    """
    texts = texts_of_file(Path(input), columns)
    found = adapted(adapter, model)
    if len(texts[0]) != found.texts:
        raise GatesError(
            f"{input} has rows of {len(texts[0])} texts, the adapter was trained on rows of"
            f" {found.texts}: give such rows"
        )
    outputs = outputs_of(found.model, encode_texts(found.folder, texts, found.context))
    for own, text in zip(outputs, texts, strict=True):
        if found.classes:
            chances = torch.softmax(own, 0)
            place = int(chances.argmax())
            label = f"{found.classes[place]}\t{float(chances[place]):.4f}"
        else:
            label = f"{float(own[0]):.4f}\t"
        print(label, *text, sep="\t")


def export(
    adapter: str, output: str, model: str = "minilm", overwrite_output: bool = False
) -> None:
    """Write an adapter as a plain LoRA for PEFT, with its head and the names of its labels.

    Args:
        adapter: Folder that ``adapt`` has written.
        output: Folder that is written.
        model: The model that it was trained on, see ``adapt``.
        overwrite_output: Replace the output if it exists and holds a LoRA alone.
    """
    path = Path(output).resolve()
    refuse_existing(path, overwrite=overwrite_output)
    refuse_strangers(path, (CONFIG, WEIGHTS, LABELS))
    found = adapted(adapter, model)
    export_lora(found.model, path, labels=found.classes)
    print(output)
