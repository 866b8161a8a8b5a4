"""Files of trained gates, ours and those of DiffSynth-Studio, and what adapters share."""

from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from core_gates.errors import GatesError
from diffusion.fusion.protocol import weighted_sum
from diffusion.lora_file import LoraBundle, shrink_bundle
from diffusion.lora_file.container import LoraFileError, SafetensorsFile, listed
from harness.files.atomic import replacing

PREFIX = "model_dict."
DOT = "___"  # stands for a dot in the name of a layer


def gate_tensors(gates: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Return the parameters of gates, site -> parameters, by their names in a file."""
    return {
        f"{PREFIX}{site.replace('.', DOT)}.{name}": tensor
        for site, parameters in gates.items()
        for name, tensor in parameters.items()
    }


def save_trained(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write what was trained, gates or another fusion, in bfloat16.

    Args:
        path: A ``.safetensors`` file.
        tensors: By their names in the file.
    """
    save_file({n: t.detach().bfloat16().contiguous() for n, t in tensors.items()}, path)


def load_trained(path: Path) -> dict[str, Tensor]:
    """Read what :func:`save_trained` wrote.

    Raises:
        GatesError: It is missing or damaged.
    """
    try:
        return load_file(path)
    except Exception as error:
        raise GatesError(f"{path} is missing or damaged: train it again") from error


def save_gates(path: str | Path, gates: Mapping[str, Mapping[str, Tensor]]) -> Path:
    """Write gates as DiffSynth-Studio names them, whole or not at all.

    Args:
        path: A ``.safetensors`` file.
        gates: Site -> parameters.
    """
    path = Path(path)
    tensors = {n: tensor.detach().cpu().contiguous() for n, tensor in gate_tensors(gates).items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        save_file(tensors, temporary)
    return path


def load_gates(path: str | Path, sites: Iterable[str]) -> dict[str, dict[str, Tensor]]:
    """Read gates, of which every one must belong to a site.

    Args:
        path: A ``.safetensors`` file.
        sites: Names of the sites of the model.

    Returns:
        Site -> parameters.

    Raises:
        ContainerError: The file is unsafe or damaged.
        LoraFileError: It holds no gates, some of another model, or a number that is not finite.
    """
    file = SafetensorsFile(Path(path))
    names = {site.replace(".", DOT): site for site in sites}
    found: dict[str, dict[str, Tensor]] = {}
    unknown = []
    for key in file.tensors:
        escaped, _, parameter = key.removeprefix(PREFIX).partition(".")
        if escaped not in names or not parameter:
            unknown.append(key)
            continue
        tensor = file.tensor(key)
        if not torch.isfinite(tensor.float()).all():
            raise LoraFileError(f"{file.label}: {key} is not finite; get the file again")
        found.setdefault(names[escaped], {})[parameter] = tensor
    if unknown or not found:
        what = f"gates of layers that the model lacks, {listed(unknown)}" if unknown else "no gates"
        raise LoraFileError(f"{file.label} holds {what}: give gates of this model")
    return found


def global_lora(adapters: Mapping[str, LoraBundle], rank: int) -> LoraBundle:
    """Return the best approximation of a rank to the mean of all changes, layer by layer.

    The mean ``Σ ΔW_k / K`` has the factors of all adapters side by side; QR decompositions of both
    leave a core of Kr × Kr numbers, whose singular value decomposition gives the approximation
    (Eckart and Young, 1936). No ΔW is formed. An adapter without a layer counts as zero there.

    Args:
        adapters: Name -> adapter.
        rank: That of the result; a layer whose ranks add up to less keeps their sum.

    Raises:
        GatesError: There is no adapter, they do not fit each other, or the rank is below 1.
    """
    if not adapters:
        raise GatesError("there are no adapters to approximate: give at least one")
    mean = weighted_sum(adapters, dict.fromkeys(adapters, 1 / len(adapters)))
    return shrink_bundle(mean, rank)[0]
