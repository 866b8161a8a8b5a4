"""Files of gates alone, which know the base model that they belong to."""

import hashlib
import json
import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from core_gates.adapters.sparse_low_rank import SparseLoraLinear
from core_gates.errors import GatesError
from harness.files.atomic import replacing
from language.hf.locate import base_of, locate_attention, refuse_absent

HASHED = 256
"""Values of a weight that enter the fingerprint of a base model."""

FACTS = ("kind", "base", "weights", "options")
HASH = "sha256"
"""Metadata of a file: what is known of gates, and a hash of that and their values."""

GATES = {"output_gate", "block_gate"}
"""Names of our gates in an attention module."""

ADAPTED = re.compile(r"\.base(_layer)?\.")
"""Between the names of a layer with an adapter, of ours or of PEFT, and of its weight."""


def fingerprint(model: nn.Module) -> str:
    """Return a digest of a base model, 16 hexadecimal digits.

    It is the SHA-256 of the type of the model, of the names, widths and heads of its attention,
    and of the first 256 values of a few weights, rounded to bfloat16: the token embedding, and the
    projection of queries and the output projection of the first, middle and last attention. Hence
    it is the same in float32 and bfloat16, with and without its head, a PEFT adapter or gates;
    fine-tuning, quantizing and merging an adapter into these weights make another base. Of changes
    elsewhere, `weights_digest` knows.

    Args:
        model: See `language.hf.locate.locate_attention`.

    Raises:
        GatesError: It is not a model that gates can be attached to, or has weights that are
            offloaded.
    """
    base, attentions = base_of(model), locate_attention(model)
    refuse_absent(type(base).__name__, base)
    shapes = [[a.name, a.dim, a.num_heads, a.num_kv_heads, a.head_dim] for a in attentions]
    digest = hashlib.sha256(json.dumps([base.config.model_type, shapes]).encode())
    layers = [base.get_input_embeddings()]
    for attention in (attentions[0], attentions[len(attentions) // 2], attentions[-1]):
        module = attention.module
        layers += [getattr(module, attention.queries), getattr(module, attention.projection)]
    for layer in layers:
        weight = getattr(layer, "base_layer", layer).weight  # below an adapter of PEFT
        digest.update(_bytes(weight.detach().flatten()[:HASHED].bfloat16()))
    return digest.hexdigest()[:16]


def weights_digest(model: nn.Module, left_out: Sequence[str] = ()) -> str:
    """Return a digest of sampled weights of a base model, 16 hexadecimal digits.

    It is the SHA-256 of a sample, up to 511 values at even distances of every weight, but for the
    token embedding and the head, see `token_digests`. As for `fingerprint`, dtype, adapters and
    gates do not matter.

    Args:
        model: A model of transformers, with adapters of ours or of PEFT or without.
        left_out: Names of modules of its base that do not matter either.
    """
    base = base_of(model)
    embedding = base.get_input_embeddings()
    others = [*left_out, *(n for n, m in base.named_modules() if m is embedding)]
    adapted = tuple(
        f"{name}."
        for name, module in base.named_modules()
        if hasattr(module, "base_layer") or isinstance(module, SparseLoraLinear)
    )
    digest = hashlib.sha256()
    for name, weight in base.named_parameters():
        adapter = name.startswith(adapted) and not ADAPTED.search(name)
        if adapter or name.startswith(tuple(f"{n}." for n in others)) or GATES & {*name.split(".")}:
            continue
        digest.update(ADAPTED.sub(".", name).encode())
        every = max(1, weight.numel() // HASHED)
        digest.update(_bytes(weight.detach().flatten()[::every].bfloat16()))
    return digest.hexdigest()[:16]


def token_digests(model: nn.Module, stored: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return the number of rows of the token embedding and of the head, and their fingerprints.

    A fingerprint is the SHA-256 of about four values of every row, so that each token counts.

    Args:
        model: See `weights_digest`.
        stored: What was returned for another model; as many rows are read, should it be resized.
    """
    whole: Any = model
    head = whole.get_output_embeddings() if hasattr(whole, "get_output_embeddings") else None
    found = {}
    for name, layer in {"embedding": base_of(model).get_input_embeddings(), "head": head}.items():
        weight = getattr(getattr(layer, "base_layer", layer), "weight", None)  # of PEFT
        if weight is not None and not weight.is_meta and (stored is None or name in stored):
            rows = len(weight) if stored is None else int(stored[name].partition(":")[0])
            part = weight.detach()[:rows, :: max(1, weight.shape[1] // 4)].bfloat16()
            found[name] = f"{len(part)}:{hashlib.sha256(_bytes(part)).hexdigest()[:16]}"
    return found


def other_tokens(facts: Mapping[str, str], model: nn.Module) -> str:
    """Return which of embedding and head are not those of a file, none of a file without them."""
    stored = json.loads(facts.get("tokens", "{}"))
    found = token_digests(model, stored)
    return " and ".join(n for n in found if stored[n] != found[n])


def write_gates(
    path: str | Path,
    model: nn.Module,
    *,
    kind: str,
    options: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
) -> Path:
    """Write gates of a model, whole or not at all.

    Args:
        path: A ``.safetensors`` file, which is replaced.
        model: The model that they are attached to.
        kind: What the gates are, such as ``output``.
        options: Plain values for JSON that they are built from.
        tensors: Their parameters by name.

    Returns:
        The path.

    Raises:
        GatesError: It cannot be written.
    """
    facts = {"base": fingerprint(model), "weights": weights_digest(model)}
    facts["tokens"] = json.dumps(token_digests(model))
    return write_known(path, {"kind": kind, **facts}, options, tensors)


def write_known(
    path: str | Path,
    facts: Mapping[str, str],
    options: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
) -> Path:
    """Write tensors of a ``kind`` for a ``base``, which the facts name, whole or not at all.

    Args:
        path: A ``.safetensors`` file, which is replaced.
        facts: What the file knows of itself.
        options: Plain values for JSON.
        tensors: By name.

    Raises:
        GatesError: It cannot be written.
    """
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    header = {**facts, "options": json.dumps(dict(options), sort_keys=True)}
    with replacing(Path(path)) as temporary:
        save_file(plain, temporary, metadata={**header, HASH: _digest(plain, header)})
    return Path(path)


def read_gates(
    path: str | Path, model: nn.Module, *, kind: str
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read gates that `write_gates` has written; another token embedding or head is warned of.

    Args:
        path: The file.
        model: The model that they are meant for.
        kind: What the gates are.

    Returns:
        Their options, and their parameters by name.

    Raises:
        GatesError: The file is missing or damaged, or holds gates of another kind or base.
    """
    path = Path(path)
    facts, tensors = read_known(path, kind=kind)
    if facts["base"] != (base := fingerprint(model)):
        raise GatesError(
            f"{path} holds gates of the base model {facts['base']}, this one is {base}: give the"
            " base that they were trained on"
        )
    if (stored := facts.get("weights")) != (digest := weights_digest(model)):
        raise GatesError(
            f"{path} holds gates of the base model {base} with other weights ({stored},"
            f" these are {digest}), such as before a fine-tuning: give the base that they were"
            " trained on"
        )
    if names := other_tokens(facts, model):
        warnings.warn(
            f"{path} holds gates of a base model with another {names}, such as before a"
            " fine-tuning: unless this is meant, give the base that they were trained on",
            stacklevel=3,
        )
    return json.loads(facts["options"]), tensors


def copy_into(
    own: Mapping[str, Tensor],
    tensors: Mapping[str, Tensor],
    *,
    options: Mapping[str, Any],
    given: Mapping[str, Any],
    path: str | Path,
) -> None:
    """Copy what was read into the parameters of gates, all of it or nothing.

    Args:
        own: The parameters by name.
        tensors: What `read_gates` returned, in float32 where it was rounded.
        options: What it returned as options.
        given: Options of the gates.
        path: Where it was read from.

    Raises:
        GatesError: Options, names or shapes differ.
    """
    stored, expected = ({n: tuple(t.shape) for n, t in d.items()} for d in (tensors, own))
    if dict(options) != dict(given) or stored != expected:
        raise GatesError(
            f"{path} holds gates with {options}, which do not fit those of the model with {given}:"
            " detach the gates of the model before"
        )
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(tensors[name])


def read_known(path: Path, *, kind: str) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Read the facts and tensors that `write_known` has written.

    Raises:
        GatesError: The file is missing or damaged, or is of another kind.
    """
    facts, tensors = read_tensors(path)
    if not {"kind", "base", "options", HASH} <= facts.keys():
        raise GatesError(f"{path} is not a file of gates: give one that save_gates has written")
    if facts["kind"] != kind:
        raise GatesError(f"{path} holds gates of kind {facts['kind']!r}, expected {kind!r}")
    if facts[HASH] != _digest(tensors, facts):
        raise GatesError(
            f"{path} is damaged, its values or options are not those written: get it again"
        )
    return facts, tensors


def read_tensors(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Return the metadata and the tensors of a safetensors file.

    Raises:
        GatesError: It is missing, a folder, or damaged.
    """
    if path.is_dir():
        raise GatesError(f"{path} is a folder, expected a file: name the .safetensors file in it")
    try:
        with safe_open(path, framework="pt") as file:
            return file.metadata() or {}, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except FileNotFoundError as error:
        raise GatesError(f"{path} does not exist: check the path") from error
    except (OSError, SafetensorError) as error:
        raise GatesError(f"{path} is damaged or not safetensors ({error}): get it again") from error


def _digest(tensors: Mapping[str, Tensor], facts: Mapping[str, str]) -> str:
    """Return the hexadecimal SHA-256 of names, shapes, values, and what is known of them."""
    known = [*map(facts.get, FACTS), *([facts["tokens"]] if "tokens" in facts else [])]
    digest = hashlib.sha256(json.dumps(known).encode())
    for name in sorted(tensors):
        digest.update(f"{name}{tuple(tensors[name].shape)}{tensors[name].dtype}".encode())
        digest.update(_bytes(tensors[name]))
    return digest.hexdigest()


def _bytes(tensor: Tensor) -> bytes:
    return tensor.cpu().contiguous().view(torch.uint8).numpy().tobytes()
