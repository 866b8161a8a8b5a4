"""Writing the state of a model with stacked experts in the form of a published one."""

from collections.abc import Iterator
from typing import Any, cast, get_args

from torch import Tensor, nn

from core_gates.collectives import gathered
from core_gates.errors import GatesError, check_option
from core_gates.moe.checkpoint_layouts import EXPERT_NAMES, LAYER_NAMES, Layout
from core_gates.moe.expert_parallel import ExpertParallel
from core_gates.moe.experts import StackedExperts
from core_gates.moe.layer import MoELayer


def export_state_dict(model: nn.Module, layout: Layout) -> dict[str, Tensor]:
    """Return the state of a model with the names and single experts of a published layout.

    Each rank returns the experts that it holds, under their numbers among all, and everything else
    in full: experts never travel, and the states of all ranks together are the published one, as
    sharded files are (``model-00001-of-00008``). FSDP gathers the rest, so every rank must call
    this. `torch.nn.Module.load_state_dict` reads the published form without conversion.

    Args:
        model: Any module with `core_gates.moe.experts.StackedExperts` in it; layers of
            `core_gates.moe.layer.MoELayer` get the names of published ones.
        layout: ``mixtral``, ``qwen3_moe`` or ``deepseek_v3``.

    Returns:
        Name -> tensor; experts are views of the stacks.

    Raises:
        GatesError: The layout is unknown, there are no experts, or the layout cannot hold them.
    """
    check_option("layout", layout, get_args(Layout), GatesError)
    modules = list(model.named_modules(remove_duplicate=False))
    experts = {_dotted(n): m for n, m in modules if isinstance(m, StackedExperts)}
    if not experts:
        raise GatesError(f"{type(model).__name__} holds no StackedExperts to export")
    first = {_dotted(n) + "experts.": m for n, m in modules if isinstance(m, ExpertParallel)}
    state: dict[str, Any] = dict(model.state_dict())
    single: dict[str, Tensor] = {}
    for prefix, module in experts.items():
        parallel = first.get(prefix)
        outer = prefix if parallel is None else prefix.removesuffix("experts.")
        offset = 0 if parallel is None else parallel.first_expert
        for number, name, value in _split(prefix, module, state, layout):
            single[f"{outer}{offset + number}.{name}.weight"] = value
    whole = {name: cast(Tensor, gathered(value)) for name, value in state.items()} | single
    layers = [_dotted(name) for name, module in modules if isinstance(module, MoELayer)]
    return {_renamed(name, layers, layout): value for name, value in whole.items()}


def _split(
    prefix: str, experts: StackedExperts, state: dict[str, Any], layout: Layout
) -> Iterator[tuple[int, str, Tensor]]:
    """Take the stacks out of the state; yield number, name and matrix of the experts held here."""
    where = prefix.removesuffix(".") or type(experts).__name__
    stacks = [state.pop(f"{prefix}{name}", None) for name in ("gate_up_proj", "down_proj")]
    if any(stack is None for stack in stacks) or any(key.startswith(prefix) for key in state):
        raise GatesError(
            f"{where}: the layout {layout!r} holds gated experts without biases and without"
            " parametrizations only; save the state_dict() as it is"
        )
    start = _first_row(stacks[0], where)
    gate_up, down = (getattr(stack, "to_local", lambda s=stack: s)() for stack in stacks)
    for number, (both, last) in enumerate(zip(gate_up, down, strict=True), start):
        for name, value in zip(EXPERT_NAMES[layout], (*both.chunk(2), last), strict=True):
            yield number, name, value


def _first_row(stack: Tensor, where: str) -> int:
    """Return the number of the first row that lies on this rank of a stack that FSDP has spread."""
    mesh = getattr(stack, "device_mesh", None)
    if mesh is None:
        return 0
    from torch.distributed.tensor import DTensor, Replicate, Shard

    first, size = 0, stack.shape[0]
    for dim, placement in enumerate(cast(DTensor, stack).placements):
        if isinstance(placement, Replicate):
            continue
        if placement != Shard(0):
            raise GatesError(
                f"{where}: the ranks hold parts of experts ({placement!r}), expected whole ones:"
                " spread them by Shard(0)"
            )
        chunk = -(-size // mesh.size(dim))
        skipped = min(chunk * mesh.get_local_rank(dim), size)
        first, size = first + skipped, min(chunk, size - skipped)
    return first


def _renamed(name: str, layers: list[str], layout: Layout) -> str:
    for prefix in layers:
        for ours, theirs in LAYER_NAMES.get(layout, {}).items():
            if name.startswith(prefix + ours):
                name = prefix + theirs + name.removeprefix(prefix + ours)
    return name


def _dotted(name: str) -> str:
    return f"{name}." if name else ""
