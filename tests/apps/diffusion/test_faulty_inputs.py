"""Faulty calls of the verbs on files: one line, exit code 2, and nothing is written."""

import json
import math
import struct

import pytest
import torch
from safetensors.torch import load_file, save_file

GOOD = "samples/xlabs.safetensors"
OTHER = "samples/kohya_flux_full.safetensors"
TEXT = "text_model.encoder.layers.0.self_attn.q_proj"
Q = "transformer.transformer_blocks.0.attn.to_q"


def stored(**tensors):
    return lambda path: save_file(tensors, path)


def pair(layer, value=1.0, inputs=16, outputs=16, rank=2):
    return {
        f"{layer}.lora_A.weight": torch.ones(rank, inputs),
        f"{layer}.lora_B.weight": torch.full((outputs, rank), value),
    }


def header(content):
    raw = content if isinstance(content, bytes) else json.dumps(content).encode()
    return struct.pack("<Q", len(raw)) + raw


def changed(change):
    """Copy a good sample with other bytes."""

    def write(path):
        path.write_bytes(change((path.parent / GOOD).read_bytes()))

    return write


def added(**tensors):
    return lambda path: save_file(load_file(path.parent / GOOD) | tensors, path)


def folder(path):
    path.mkdir()


def convert(source, *words, output="out.safetensors"):
    return ("diffusion", "convert", source, output, *words)


def resize(source, *words, output="out.safetensors"):
    return ("diffusion", "resize", source, output, *words)


def inspect(*words):
    return ("diffusion", "inspect", *words)


def merge(*words, files=(GOOD, OTHER), output="out.safetensors"):
    return ("diffusion", "merge", *files, "--output", output, *words)


BAD = "bad.safetensors"
NAN = {BAD: stored(**pair(Q, math.nan))}
ZERO = {BAD: stored(**pair(Q, 0.0))}
OF_TEXT = {BAD: stored(**pair(f"text_encoder_2.{TEXT}"))}
WAN = {BAD: stored(**pair("blocks.0.self_attn.q"))}
STRANGE = {BAD: added(strange=torch.ones(3))}
MINE = {"out.safetensors": "mine"}
WIDE = {BAD: stored(**pair(Q, inputs=32, outputs=32))}
DORA = {BAD: stored(**pair(Q), **{f"{Q}.lora_magnitude_vector": torch.ones(16)})}

FAULTS = {
    # Files.
    "missing file": (inspect("none.safetensors"), "none.safetensors does not exist"),
    "folder without files": (
        inspect("empty"),
        "empty holds no .safetensors file",
        {"empty": folder},
    ),
    "pickle": (
        inspect("bad.pt"),
        "is a pickle, which can run any code",
        {"bad.pt": b"PK\x03\x04" * 9},
    ),
    "pickle by another name": (
        convert(BAD),
        "is a pickle in spite of its name",
        {BAD: b"PK\x03\x04" * 9},
    ),
    "other kind of file": (convert("a.txt"), "must end with .safetensors", {"a.txt": "text"}),
    "empty file": (inspect(BAD), "has 0 bytes, too few", {BAD: b""}),
    "truncated": (convert(BAD), "follow the header", {BAD: changed(lambda raw: raw[:-7])}),
    "huge header": (
        inspect(BAD),
        "announces a header of 9223372036854775808 bytes",
        {BAD: struct.pack("<Q", 2**63) + b"{}"},
    ),
    "no JSON": (inspect(BAD), "is not valid JSON", {BAD: header(b"{" * 100)}),
    "key twice": (inspect(BAD), "occurs twice", {BAD: header(b'{"a": 1, "a": 2}')}),
    "NaN": (convert(BAD), "NaN or infinity in transformer_blocks.0.attn.to_q", NAN),
    "zero": (convert(BAD), "the change of every layer is zero", ZERO),
    "unknown tensor": (
        convert(BAD),
        r"strange: its name ends with no known factor; get the file again, or leave that out by",
        STRANGE,
    ),
    "text encoder alone": (convert(BAD), "no layer of the transformer is changed", OF_TEXT),
    "text encoder alone, lenient": (
        convert(BAD, "--lenient"),
        "diffusers cannot hold 1 layers of text_encoder_2",
        OF_TEXT,
    ),
    "other family": (convert(BAD), "is an adapter for wan", WAN),
    "other family than the base": (convert(GOOD, "--base", "sd3"), "but the base is sd3"),
    "all files are faulty": (
        inspect("bad"),
        "is a pickle.*and 1 more files are refused",
        {"bad/a.ckpt": b"\x80\x02", "bad/b.safetensors": b""},
    ),
    # Bases.
    "unknown base": (
        convert(GOOD, "--base", "sdxl"),
        "--base is 'sdxl', expected flux or sd3, or a folder",
    ),
    "base without model": (
        inspect(GOOD, "--base", "empty"),
        "empty holds no model of diffusers",
        {"empty": folder},
    ),
    "base of another class": (
        convert(GOOD, "--base", "base"),
        "is of class 'UNet2DConditionModel'",
        {"base/config.json": '{"_class_name": "UNet2DConditionModel"}'},
    ),
    "base with a wrong number": (
        convert(GOOD, "--base", "base"),
        "num_layers is 'two', expected a positive integer",
        {"base/config.json": '{"_class_name": "FluxTransformer2DModel", "num_layers": "two"}'},
    ),
    "base that is damaged": (
        convert(GOOD, "--base", "base"),
        "is not valid JSON",
        {"base/config.json": "{"},
    ),
    # Options.
    "unknown format": (
        convert(GOOD, "--to", "difusers"),
        "to: expected 'diffusers', 'peft'.*found 'difusers'",
    ),
    "unknown numbers": (convert(GOOD, "--dtype", "int8"), "dtype: expected .*found 'int8'"),
    "rank 0": (convert(GOOD, "--rank", "0"), "error: --rank is 0, expected 1 or more"),
    "rank in words": (convert(GOOD, "--rank", "low"), "rank: expected int or null, found 'low'"),
    "energy 2": (convert(GOOD, "--energy", "2"), "error: --energy is 2.0, expected a fraction"),
    "energy NaN": (
        convert(GOOD, "--energy", "nan"),
        "energy: expected float or null",
    ),
    "no output": (("diffusion", "convert", GOOD), "nothing is given for OUTPUT"),
    "misspelled option": (convert(GOOD, "--lenientt"), "did you mean --lenient?"),
    "misspelled verb": (("diffusion", "inspekt", GOOD), "did you mean inspect?"),
    # Outputs.
    "output exists": (
        convert(GOOD),
        "out.safetensors exists: choose another OUTPUT or add --overwrite_output",
        MINE,
    ),
    "output is the input": (convert(GOOD, "--overwrite_output", output=GOOD), "is the output"),
    "output in a read-only folder": (
        convert(GOOD, output="/proc/out.safetensors"),
        "/proc/out.safetensors cannot be written: choose another OUTPUT",
    ),
    "merged into a place that cannot be": (
        ("diffusion", "merge", GOOD, OTHER, "--output", "x" * 300 + ".safetensors"),
        "x.safetensors cannot be written: File name too long",
    ),
    "output below a file": (
        convert(GOOD, output=f"{OTHER}/out.safetensors"),
        "is a file and no folder",
    ),
    "output of another kind": (
        convert(GOOD, output="out.ckpt"),
        "out.ckpt must end with .safetensors",
    ),
    "output is a folder": (
        convert(GOOD, "--to", "peft", "--overwrite_output", output="samples"),
        "samples is a folder with .* in it, which is not replaced",
    ),
    "JSON exists": (inspect(GOOD, "--json", "a.json"), "choose another --json", {"a.json": "{}"}),
    "JSON is the input": (
        inspect(GOOD, "--json", GOOD, "--overwrite_output"),
        "choose another --json",
    ),
    "no rank": (resize(GOOD), "nothing says how far to shrink: give --rank or --energy"),
    "resized to rank 0": (resize(GOOD, "--rank", "0"), "--rank is 0, expected 1 or more"),
    "resized to energy 2": (resize(GOOD, "--energy", "2"), "--energy is 2.0, expected a fraction"),
    "resized is the input": (
        resize(GOOD, "--rank", "1", "--overwrite_output", output=GOOD),
        "is the output",
    ),
    # Merges.
    "one file": (merge(files=(GOOD,)), "one file is nothing to merge"),
    "missing file of a merge": (
        merge(files=(GOOD, "none.safetensors")),
        "none.safetensors does not exist",
    ),
    "one name twice": (merge(files=(GOOD, GOOD)), "are both called 'xlabs': name one by NAME=PATH"),
    "a bad name": (merge(files=(GOOD, f"a:b={OTHER}")), "'a:b' is no name for an adapter"),
    "unknown method": (merge("--method", "tie"), "method: expected 'sum'"),
    "unknown adapter": (
        merge("--method", "cat", "--weights", "xlab:1"),
        "'xlab', which is none of the adapters (did you mean xlabs?)",
    ),
    "adapter twice": (
        merge("--method", "cat", "--weights", "xlabs:1,xlabs:2"),
        "names 'xlabs' twice",
    ),
    "NaN strength": (
        merge("--method", "cat", "--weights", "xlabs:nan"),
        "the strength 'nan', expected a finite number",
    ),
    "strength in words": (
        merge("--method", "cat", "--weights", "xlabs:much"),
        "expected a finite number",
    ),
    "too few numbers": (
        merge("--method", "cat", "--weights", "1"),
        "gives 1 numbers for 2 adapters",
    ),
    "zero strengths": (merge("--method", "cat", "--weights", "0,0"), "nothing is left"),
    "strengths of a mean": (
        merge("--method", "mean", "--weights", "1,2"),
        "--weights has no meaning for mean",
    ),
    "no strengths": (merge("--method", "weighted"), "needs --weights"),
    "density of a sum": (merge("--density", "0.5"), "--density has no meaning for sum"),
    "density 0": (
        merge("--method", "ties_svd", "--density", "0"),
        "--density is 0.0, expected a fraction",
    ),
    "unequal ranks": (merge("--method", "linear"), "linear needs equal ranks"),
    "two families": (merge(files=(GOOD, "samples/kohya_sd3.safetensors")), "'kohya_sd3' for sd3"),
    "unlike models": (
        merge(files=("samples/bfl_plain.safetensors", BAD)),
        "adapters are of unlike models",
        WIDE,
    ),
    "DoRA": (merge(files=(GOOD, BAD)), "'bad' is a DoRA", DORA),
    "text encoders of a merge": (
        merge("--method", "ties_svd", files=(GOOD, BAD)),
        "ties_svd cannot merge 1 layers of text_encoder in 'bad'",
        {BAD: stored(**pair(Q), **pair(f"text_encoder.{TEXT}"))},
    ),
    "rank above the limit": (merge("--rank", "-1"), "error: --rank is -1, expected 1 or more"),
    "merged output exists": (merge(), "out.safetensors exists", MINE),
    "merged output is an input": (merge("--overwrite_output", output=GOOD), "is the output"),
}


@pytest.mark.parametrize("verb", ["inspect", "convert", "resize", "merge", "inspekt"])
def test_faulty_inputs(verb, faulty_inputs, samples, tmp_path):
    chosen = {name: fault for name, fault in FAULTS.items() if fault[0][1] == verb}
    faulty_inputs(chosen, folder=tmp_path)


def test_there_are_many_faults():
    assert len(FAULTS) >= 60
