"""``gates language predict`` and ``export``: label texts with an adapter, and give it to PEFT."""

from pathlib import Path
from typing import Any

import torch

from core_gates.errors import GatesError
from harness.command.verbs import refuse_existing
from harness.files.piece import RECORD, Record, read_record
from language.adapt.adapter_training import FILE, outputs_of
from language.adapt.labeled_texts import texts_of_file
from language.hf.classifier import classifier_folder, encode_texts, open_classifier
from language.hf.lora import export_lora, load_sora


def adapted(adapter: str, model: str) -> tuple[Any, Record]:
    """Return a model with an adapter that ``adapt`` has written, and the record of the adapter.

    Raises:
        GatesError: The adapter is missing or damaged, or is one of another model.
    """
    record = read_record(Path(adapter))
    if record is None or not {"classes", "texts"} <= record.facts.keys():
        raise GatesError(
            f"{adapter} has no {RECORD} of an adapter: give a folder that adapt has written, such"
            " as runs/language/minilm/adapters/sora-r8-s0"
        )
    classifier = open_classifier(classifier_folder(model), len(record.facts["classes"]) or 1)
    load_sora(classifier, Path(adapter) / FILE)
    return classifier, record


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
    classifier, record = adapted(adapter, model)
    classes, number = record.facts["classes"], record.facts["texts"]
    if odd := {len(row) for row in texts} - {number}:
        raise GatesError(
            f"{input} has rows of {odd.pop()} texts, the adapter was trained on rows of"
            f" {number}: give such rows"
        )
    context = int(record.settings["context"])
    outputs = outputs_of(classifier, encode_texts(classifier_folder(model), texts, context))
    for logits, text in zip(outputs, texts, strict=True):
        if classes:
            chance, place = torch.softmax(logits, 0).max(0)
            label = f"{classes[int(place)]}\t{float(chance):.4f}"
        else:
            label = f"{float(logits[0]):.4f}\t"
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
    classifier, record = adapted(adapter, model)
    export_lora(classifier, path, labels=record.facts["classes"])
    print(output)
