"""A trained ranker as a folder: configuration, weights, and the transform that encodes its rows."""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import math
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from core_gates.collectives import rank_in
from core_gates.errors import GatesError, check_option
from harness.files import content_digest, finite, replacing, sha256, short_digest, write_json
from recsys.embedding.bank import restored, rounded
from recsys.ranker import Ranker
from recsys.schema import FeatureSchema

KIND, FORMAT = "recsys ranker", 1
CONFIG, WEIGHTS, TRANSFORM = "config.json", "model.safetensors", "transform"
SCALES, INTERCEPTS = " scales", "intercepts"
LONGEST = 400  # characters of an error that is told

TableType = Literal["float32", "bfloat16", "int8"]
NetType = Literal["float32", "bfloat16"]


class LoadedModel(NamedTuple):
    """What a model folder holds.

    Attributes:
        ranker: In evaluation mode, in float32.
        transform: Encodes its rows, a `recsys.transform.FeatureTransform`.
        settings: As given to `save_model`.
        hash: Hexadecimal digest of everything in the folder.
        versions: Of this package and of torch when it was written.
    """

    ranker: Ranker
    transform: Any
    settings: dict[str, Any]
    hash: str
    versions: dict[str, str]


def save_model(
    folder: Path,
    ranker: Ranker,
    transform: Any,
    settings: Mapping[str, Any] | None = None,
    *,
    tables: TableType = "float32",
    net: NetType = "float32",
) -> Path:
    """Write a ranker, its transform and its settings; the folder is the old or the new one.

    A table in ``int8`` takes d + 4 bytes per row and is off by at most max |w| / 254 of each row.
    On several ranks each must call this; rank 0 writes.

    Args:
        folder: Folder, which replaces an old one.
        ranker: Made by `recsys.ranker.Ranker.build`.
        transform: Fitted transform that its sizes are of.
        settings: What decided the training; plain values of JSON.
        tables: Type of the embedding tables in the file.
        net: Type of all other weights; running statistics stay in float32.

    Returns:
        The folder.

    Raises:
        GatesError: The ranker cannot be built again, its network is folded, or the transform is of
            another one.
        ValueError: A type is unknown.
    """
    check_option("tables", tables, ("float32", "bfloat16", "int8"))
    check_option("net", net, ("float32", "bfloat16"))
    config = _config(ranker, settings or {}, tables, net)
    _check_net(ranker)
    _check_transform(ranker, transform)
    state = _packed(ranker, tables, net)
    if rank_in():
        return folder
    with replacing(folder) as temporary:
        temporary.mkdir(parents=True)
        transform.save(temporary / TRANSFORM)
        save_file(state, temporary / WEIGHTS)
        files = sorted(path for path in temporary.rglob("*") if path.is_file())
        config["files"] = {path.relative_to(temporary).as_posix(): sha256(path) for path in files}
        write_json(temporary / CONFIG, config | {"hash": short_digest(config, 64)})
    return folder


def load_model(folder: Path, *, int8: bool = False) -> LoadedModel:
    """Read what `save_model` wrote; every file must have its digest.

    Args:
        folder: Model folder.
        int8: Whether tables are 8-bit integers in memory, too, for serving.

    Raises:
        GatesError: The folder is absent, of another kind or version, or damaged, was replaced
            meanwhile, or a weight is not finite.
    """
    folder = Path(folder)
    config = _read_config(folder)
    try:
        transform = importlib.import_module("recsys.transform").FeatureTransform
        loaded = transform.load(folder / TRANSFORM)
        with torch.random.fork_rng(devices=[]):
            ranker = Ranker.build(
                FeatureSchema.from_dict(config["schema"]),
                config["sizes"],
                config["dense_width"],
                config["net"]["name"],
                config["net"]["options"],
                prior=config["prior"],
                encoders=config["encoders"],
                calibrated=config.get("calibrated", False),
            )
        if ranker.heads is not None:
            ranker.heads.take_scalers(loaded.scalers)
        _unpack(ranker, load_file(folder / WEIGHTS))
        _check_finite(ranker)
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, GatesError) as error:
        raise GatesError(f"{folder} cannot be loaded: {_told(error)}; {_advice(config)}") from error
    if _config_of(folder)["hash"] != config["hash"]:
        raise GatesError(f"{folder} was replaced while it was read: load it again")
    if int8:
        for bank in ranker.banks:
            bank.to_int8()
    settings, versions = config["settings"], config["versions"]
    return LoadedModel(ranker.eval(), loaded, settings, config["hash"], versions)


def read_settings(folder: Path) -> dict[str, Any]:
    """Return the settings that were given to `save_model`, without reading the weights.

    Raises:
        GatesError: The folder is absent, of another kind or version, or damaged.
    """
    return dict(_config_of(Path(folder))["settings"])


def _config(
    ranker: Ranker, settings: Mapping[str, Any], tables: TableType, net: NetType
) -> dict[str, Any]:
    if ranker.spec is None:
        raise GatesError(
            f"this ranker, with a {type(ranker.net).__name__}, cannot be built again from a file: "
            "make it with Ranker.build"
        )
    config = {
        "kind": KIND,
        "format": FORMAT,
        "schema": ranker.schema.to_dict(),
        "sizes": ranker.sizes,
        "dense_width": ranker.dense_width,
        "net": ranker.spec._asdict(),
        "prior": list(ranker.prior),
        "encoders": ranker.encoders,
        "calibrated": ranker.intercepts is not None,
        "types": {"tables": tables, "net": net},
        "versions": {"gatesuite": _version(), "torch": str(torch.__version__)},
        "settings": dict(settings),
    }
    try:
        return cast(dict[str, Any], json.loads(json.dumps(finite(config), allow_nan=False)))
    except TypeError as error:
        raise GatesError(
            f"settings or options of the network are no plain values of JSON: {error}"
        ) from error


def _check_net(ranker: Ranker) -> None:
    """Refuse a network that has other weights than what its specification builds."""
    assert ranker.spec is not None
    models: Any = importlib.import_module("recsys.models")
    width = ranker.input_layers[0].out_dim
    with torch.random.fork_rng(devices=[]):
        name, options = ranker.spec
        built: nn.Module = models.build(name, dict(options), width, ranker.schema.heads)
    state, wanted = ranker.net.state_dict(), built.state_dict()
    differing = sorted(
        name
        for name in state.keys() | wanted.keys()
        if name not in state or name not in wanted or state[name].shape != wanted[name].shape
    )
    if differing:
        raise GatesError(
            f"the weights of the network are not those that {ranker.spec.name} is built with, see "
            f"{differing[0]!r}: save the ranker as it was trained, not folded() for inference"
        )


def _check_finite(ranker: Ranker) -> None:
    """Refuse weights and running statistics that are NaN or infinite."""
    statistics = [
        b for b in ranker.named_buffers() if b[0].rpartition(".")[2].startswith("running")
    ]
    for name, value in [*ranker.named_parameters(), *statistics]:
        if not math.isfinite(value.detach().sum(dtype=torch.float64)):
            raise ValueError(f"its weights {name} are not finite, the training has diverged")
    if ranker.intercepts is not None and not ranker.intercepts.isfinite().all():
        raise ValueError("its intercepts are not finite")


def _told(error: Exception) -> str:
    """Return an error in one line; that of a state dict has one for each weight."""
    line = " ".join(str(error).split())
    return line if len(line) <= LONGEST else f"{line[:LONGEST]} …"


def _advice(config: Mapping[str, Any]) -> str:
    written = config["versions"].get("gatesuite")
    if written == _version():
        return "write it again with save_model, or train again"
    return f"written by version {written}, use that one or train again"


def _check_transform(ranker: Ranker, transform: Any) -> None:
    """Refuse a transform whose rows are not those of the tables."""
    if transform.schema != ranker.schema or transform.dense_width != ranker.dense_width:
        raise GatesError("the transform is of another schema than the ranker: save its own")
    for name, rows in ranker.sizes.items():
        if transform.sizes.get(name) != rows:
            raise GatesError(
                f"table {name!r} has {rows} rows in the ranker and {transform.sizes.get(name)} in "
                "the transform: save the transform that it was trained with, or grow the ranker"
            )


def _packed(ranker: Ranker, tables: TableType, net: NetType) -> dict[str, Tensor]:
    """Return all weights by their names in the file."""
    packed: dict[str, Tensor] = {}
    for prefix, module in _modules(ranker):
        parameters = {name for name, _ in module.named_parameters()}
        for name, value in module.state_dict().items():
            dtype = getattr(torch, net) if name in parameters else torch.float32
            packed[prefix + name] = value.to(dtype) if value.is_floating_point() else value
    if ranker.intercepts is not None:
        packed[INTERCEPTS] = ranker.intercepts
    for number, bank in enumerate(ranker.banks):
        for name, table in bank.named_tables().items():
            key = f"tables.{number}.{name}"
            if tables == "int8":
                packed[key], packed[key + SCALES] = rounded(table.float())
            else:
                packed[key] = table.to(getattr(torch, tables))
    return {name: value.detach().cpu().contiguous().clone() for name, value in packed.items()}


def _unpack(ranker: Ranker, packed: dict[str, Tensor]) -> None:
    """Put weights of a file into a ranker; all must be there, and nothing else."""
    for prefix, module in _modules(ranker):
        mine = {n.removeprefix(prefix): packed.pop(n) for n in list(packed) if n.startswith(prefix)}
        module.load_state_dict(mine)
    for number, bank in enumerate(ranker.banks):
        tensors = {}
        for name in bank.named_tables():
            table = packed.pop(f"tables.{number}.{name}")
            scales = packed.pop(f"tables.{number}.{name}{SCALES}", None)
            tensors[name] = table if scales is None else restored(table, scales)
        bank.load_named_tables(tensors)
    if ranker.intercepts is not None:
        ranker.intercepts.copy_(packed.pop(INTERCEPTS))
    if packed:
        raise ValueError(f"it holds weights that the network lacks, such as {min(packed)}")


def _modules(ranker: Ranker) -> list[tuple[str, nn.Module]]:
    encoders = [(f"encoders.{i}.", layer.encoders) for i, layer in enumerate(ranker.input_layers)]
    heads = [] if ranker.heads is None else [("heads.", ranker.heads)]
    return [("net.", ranker.net), *encoders, *heads]


def ranker_to_start_from(folder: Path, transform: Any) -> Ranker:
    """Return the ranker of a model folder whose transform encodes rows as another one does.

    Args:
        folder: Model folder.
        transform: A `recsys.transform.FeatureTransform`, of the training to come.

    Raises:
        GatesError: See `load_model`; or rows are encoded otherwise.
    """
    loaded = load_model(folder)
    if _digest(loaded.transform) != _digest(transform):
        raise GatesError(
            f"{folder} encodes rows otherwise than this training will, by other vocabularies or "
            "scales: train it on the same training rows, with the same features"
        )
    return loaded.ranker


def _digest(transform: Any) -> str:
    with tempfile.TemporaryDirectory() as folder:
        return content_digest(transform.save(Path(folder) / TRANSFORM)).sha256


def _read_config(folder: Path) -> dict[str, Any]:
    """Return the configuration of a folder whose files are as they were written."""
    config = _config_of(folder)
    for name, digest in config["files"].items():
        if not (folder / name).is_file():
            raise GatesError(f"{folder} lacks {name}: copy the folder again")
        if sha256(folder / name) != digest:
            raise GatesError(f"{folder / name} is damaged, its digest is wrong: copy it again")
    return config


def _config_of(folder: Path) -> dict[str, Any]:
    """Return the configuration of a folder, which is as it was written."""
    path = folder / CONFIG
    if not path.is_file():
        raise GatesError(f"{folder} is no model folder, it has no {CONFIG}: name one of a training")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise GatesError(f"{path} is damaged: {error}; copy the folder again") from error
    kind = config.get("kind") if isinstance(config, dict) else None
    if kind != KIND:
        raise GatesError(f"{folder} is no model folder, its {CONFIG} is of kind {kind!r}")
    if config.get("format") != FORMAT:
        raise GatesError(
            f"{folder} has format {config.get('format')}, this version reads {FORMAT}: use the "
            "version that wrote it"
        )
    written = config.get("hash")
    if short_digest({n: value for n, value in config.items() if n != "hash"}, 64) != written:
        raise GatesError(f"{path} was changed after it was written: copy the folder again")
    return cast(dict[str, Any], config)


def _version() -> str:
    try:
        return importlib.metadata.version("gatesuite")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"
