"""Faulty calls of the verbs that train: one line, exit code 2, and nothing is written."""

import shutil

import pytest
import torch
from safetensors.torch import save_file

COLUMNS = "model_file,image_file,text,text_short,text_medium\n"
ROWS = "a0.safetensors,images/0.png,a red apple,,\na1.safetensors,images/1.png,a blue boat,,\n"


def lora(*words, images="images", base="base"):
    return ("diffusion", "train-lora", images, "--base", base, *words)


def retriever(*words, csv="table.csv", base="base"):
    return ("diffusion", "train-retriever", "--csv", csv, "--base", base, *words)


def gates(*words, csv="table.csv", base="base"):
    return ("diffusion", "train-gates", "--csv", csv, "--base", base, *words)


def base(*words):
    return ("diffusion", "train-base", "--text_encoder", "ngrams", "--shape", "unit", *words)


def csv(text):
    return {"bad.csv": text}


def wide(path):
    layer = "transformer.transformer_blocks.0.attn.to_q"
    save_file(
        {f"{layer}.lora_A.weight": torch.ones(2, 48), f"{layer}.lora_B.weight": torch.ones(48, 2)},
        path,
    )


def uncaptioned(path):
    path.mkdir()
    shutil.copy(path.parent / "images" / "0.png", path / "a.png")


def folder(path):
    path.mkdir()


def alone(path):
    path.write_text(COLUMNS + ROWS.splitlines()[0] + "\n")


SEED = "--seed is -1, expected a number from 0 to 4294967295"
FAULTS = {
    "gate options of strengths": (
        gates("--what", "strengths", "--factors", "true", "--variant=no_base"),
        "--factors, --variant have no meaning for --what strengths: leave them out",
    ),
    # train-base
    "base of no steps": (base("--steps", "0"), "--steps is 0, expected 1 or more"),
    "unknown shape": (base("--shape", "huge"), "--shape is 'huge'; choose one of tiny, unit"),
    "learning rate of a base": (base("--learning_rate", "nan"), "learning_rate"),
    "unknown text encoder": (base("--text_encoder", "t5"), "no text encoder is named 't5'"),
    "images that are not there": (base("--images", "none"), "none is no folder"),
    "read-only runs": (base("--root", "/proc/runs"), "/proc/runs"),
    # what gates are told
    "roles without factors": (
        gates("--role_fraction", "1", "--factors", "false"),
        "--role_fraction is 1.0, expected 0 to 1, above 0 with",
    ),
    "roles that are not told": (gates("--roles", "a:style"), "--roles needs --role_fraction"),
    "unknown role": (
        gates("--role_fraction", "1", "--roles", "a:shape"),
        "--roles is 'a:shape', expected adapters with one of ['any', 'subject', 'style']",
    ),
    "role of another adapter": (
        gates("--role_fraction", "1", "--roles", "z:style"),
        "no adapter is named 'z'",
    ),
    "seed below 0, of gates": (gates("--seed", "-1"), SEED),
    "seed below 0, of a base": (base("--seed", "-1"), SEED),
    "seed below 0, of an adapter": (lora("--seed", "-1"), SEED),
    "seed that is too large": (
        retriever("--seed", "4294967296"),
        "--seed is 4294967296, expected a number from 0 to 4294967295",
    ),
    "no strengths to begin at": (gates("--begin", "none"), "--begin is none, which does not exist"),
    "switch without scores": (gates("--switch", "true"), "--switch needs scores of adapters"),
    # train-lora
    "no folder": (lora(images="none"), "none is no folder"),
    "two folders": (("diffusion", "train-lora", "images", "base"), "expected one folder"),
    "empty folder": (lora(images="empty"), "holds no image", {"empty": folder}),
    "image without caption": (lora(images="bare"), "has no caption", {"bare": uncaptioned}),
    "rank that is not read": (lora("--rank", "2000"), "--rank is 2000, expected 1024 or less"),
    "rank 0": (lora("--rank", "0"), "--rank is 0, expected 1 or more"),
    "NaN learning rate": (lora("--learning_rate", "nan"), "learning_rate"),
    "negative learning rate": (lora("--learning_rate", "-1"), "expected a positive number"),
    "caption dropout of 1": (lora("--caption_dropout", "1"), "expected a fraction from 0 to"),
    "unknown part": (lora("--parts", "head"), "no part of a block is named 'head'"),
    "no base": (lora(base="none"), "--base is none, which is no folder"),
    "base of another kind": (lora(base="images"), "holds no model of diffusers"),
    "no embedded base": (("diffusion", "train-lora", "images"), "run `gates diffusion train-base`"),
    "damaged table of images": (
        lora(images="images2"),
        'line 1 is no {"file_name": ..., "text": ...}',
        {"images2/metadata.jsonl": "{\n"},
    ),
    # train-retriever
    "no csv": (retriever(csv="none.csv"), "none.csv cannot be read"),
    "csv without a column": (
        retriever(csv="bad.csv"), "lacks the columns image_file", csv("model_file,text\na,b\n"),
    ),
    "missing adapter": (
        retriever(csv="bad.csv"),
        "none.safetensors",
        csv(COLUMNS + "none.safetensors,images/0.png,x,,\n"),
    ),
    "adapter of another base": (
        retriever(csv="bad.csv"),
        "wide.safetensors",
        csv(COLUMNS + "wide.safetensors,images/0.png,x,,\n") | {"wide.safetensors": wide},
    ),
    "adapter outside": (
        retriever(csv="bad.csv"), "lies outside of", csv(COLUMNS + "../a.safetensors,0.png,x,,\n"),
    ),
    "one concept": (
        retriever(csv="bad.csv"), "adapters of one concept",
        csv(COLUMNS + "a0.safetensors,images/0.png,x,,\n"),
    ),
    "no text encoder": (retriever(base="flux"), "--base flux has no text encoder"),
    "steps 0": (retriever("--steps", "0"), "--steps is 0, expected 1 or more"),
    "unknown recipe": (retriever("--recipe", "mine"), "recipe: expected"),
    "all held out": (retriever("--held_out", "1"), "expected a fraction from 0 to below 1"),
    "sharded retriever": (
        retriever("--devices", "2", "--strategy", "fsdp2"), "the retriever has none",
    ),
    "base without csv": (
        ("diffusion", "train-retriever", "--base", "base"), "need --csv",
    ),
    # train-gates
    "unknown variant": (gates("--variant", "half"), "variant: expected"),
    "one adapter": (gates(csv="one.csv"), "gates weigh several", {"one.csv": alone}),
    "image that is missing": (
        gates(csv="bad.csv"), "names images/99.png, which is missing",
        csv(COLUMNS + ROWS + "a2.safetensors,images/99.png,x,,\n"),
    ),
    "row without image": (
        gates(csv="bad.csv"), "has no image_file", csv(COLUMNS + ROWS + "a2.safetensors,,x,,\n"),
    ),
    "adapter of another base, of gates": (
        gates(csv="bad.csv"), "wide.safetensors",
        csv(COLUMNS + ROWS + "wide.safetensors,images/2.png,x,,\n") | {"wide.safetensors": wide},
    ),
    "adapter twice": (
        gates(csv="bad.csv"), "names an adapter twice",
        csv(COLUMNS + ROWS + "a2.safetensors;a2.safetensors,images/2.png,x,,\n"),
    ),
    "adapter twice, in other words": (
        gates(csv="bad.csv"), "names an adapter twice",
        csv(COLUMNS + ROWS + "a2.safetensors;./a2.safetensors,images/2.png,x,,\n"),
    ),
    "no adapter": (
        gates(csv="bad.csv"), "names no adapter", csv(COLUMNS + ROWS + ";,images/2.png,x,,\n"),
    ),
    "adapter without partners": (
        gates(csv="bad.csv"), "has images of a2.safetensors alone",
        csv(
            COLUMNS + "a0.safetensors;a1.safetensors,images/0.png,x,,\n"
            "a2.safetensors,images/2.png,x,,\n"
        ),
    ),
    "shares that differ": (
        gates("--devices", "3"), "cannot be shared equally by 3 processes",
    ),
    "no process": (gates("--devices", "0"), "--devices is 0, expected 1 or more"),
    "negative rank": (gates("--global_rank", "-1"), "--global_rank is -1, expected 0 or more"),
    "margin 0": (gates("--contrast", "--margin", "0"), "expected a positive number"),
    "size of the embedded base": (gates("--size", "0"), "--size is 0"),
    "misspelled option": (gates("--variants", "full"), "did you mean --variant?"),
}  # fmt: skip


@pytest.mark.parametrize("verb", ["train-base", "train-lora", "train-retriever", "train-gates"])
def test_faults_are_one_line(verb, faulty_inputs, place, monkeypatch):
    monkeypatch.setattr(
        "apps.diffusion.embedded_world.BASE",
        {"shape": "unit", "steps": 1, "batch_size": 1, "learning_rate": 1.0,
         "text_encoder": "ngrams"},
    )  # fmt: skip
    chosen = {name: fault for name, fault in FAULTS.items() if fault[0][1] == verb}
    assert len(chosen) >= 6
    faulty_inputs(chosen, folder=place)


def test_there_are_many_faults():
    assert len(FAULTS) >= 30
