"""Files of trained gates, ours and those of DiffSynth-Studio, and of other trained fusions."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from core_gates.errors import GatesError
from diffusion.lora_file.container import LoraFileError, SafetensorsFile, listed
from harness.files.atomic import replacing

PREFIX = "model_dict."
DOT = "___"  # stands for a dot in the name of a layer
SWITCH = "adapter_switch"  # site of the parameters of the switch, or of the relevance gate


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
    """Read what `save_trained` wrote.

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
        Site -> parameters; those of a switch at the site `SWITCH`.

    Raises:
        ContainerError: The file is unsafe or damaged.
        LoraFileError: It holds no gates, some of another model, or a number that is not finite.
    """
    file = SafetensorsFile(Path(path))
    names = {site.replace(".", DOT): site for site in (*sites, SWITCH)}
    states: dict[str, dict[str, Tensor]] = {}
    unknown = []
    for key in file.tensors:
        escaped, _, parameter = key.removeprefix(PREFIX).partition(".")
        if escaped not in names or not parameter:
            unknown.append(key)
            continue
        tensor = file.tensor(key)
        if not torch.isfinite(tensor.float()).all():
            raise LoraFileError(f"{file.label}: {key} is not finite; get the file again")
        states.setdefault(names[escaped], {})[parameter] = tensor
    shared = states.get(SWITCH, {})
    if "width" in shared and not (shared["width"].numel() == 1 and shared["width"].item() > 0):
        raise LoraFileError(f"{file.label}: the width of its gate is not positive; get it again")
    if "embedder" in shared and not ((shared["embedder"] >= 0) & (shared["embedder"] < 256)).all():
        raise LoraFileError(f"{file.label}: the name of its encoder is damaged; get it again")
    if unknown or not states.keys() - {SWITCH}:
        what = f"gates of layers that the model lacks, {listed(unknown)}" if unknown else "no gates"
        raise LoraFileError(f"{file.label} holds {what}: give gates of this model")
    return states


def mode_of(states: Mapping[str, Mapping[str, Tensor]]) -> str:
    """Return the mode of `diffusion.fusion.GatedFusion` that what `load_gates` has read is for."""
    if "threshold" in states.get(SWITCH, {}):
        return "relevance"
    return "gated" if any("bias" in state for state in states.values()) else "strengths"


def options_of(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return the options of the gate that a state is of; those of its factors, if it has no more.

    Args:
        state: Parameters of one gate, by name.
    """
    options = {"kinds": state["factors"].shape[-1]} if "factors" in state else {}
    if "bias" not in state:
        return options
    variant = "full"
    if "weight_lora" not in state:
        variant = "no_lora"
    elif "weight_base" not in state:
        variant = "no_base" if "weight_cross" in state else "no_cross"
    return options | {"variant": variant, "time": "film" if "weight_time" in state else "implicit"}


def load_gate(gate: nn.Module, state: Mapping[str, Tensor], site: str) -> None:
    """Load the parameters of a gate; it keeps its own where a file has factors alone, or none.

    Args:
        gate: Of a site.
        state: Its parameters by name.
        site: Its name.

    Raises:
        GatesError: They do not fit.
    """
    expected = gate.state_dict()
    lacking = expected.keys() - {"factors"} if state.keys() == {"factors"} else {"factors"}
    complete = {name: expected[name] for name in lacking & expected.keys()} | dict(state)
    try:
        gate.load_state_dict(complete, assign=next(iter(expected.values())).is_meta)
    except RuntimeError as error:
        first = " ".join(str(error).splitlines()[1:2]).strip()
        raise GatesError(f"the gate of {site} does not fit the model: {first}") from error
