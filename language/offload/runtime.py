"""Mixture models of transformers that read experts when tokens need them."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import RLock
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from core_gates.errors import GatesError, check_positive
from language.offload.allocation import allocate
from language.offload.caches import ExpertCache, make_cache
from language.offload.expert_store import ExpertStore, SlabTensor
from language.offload.pool import SlabPool, make_pool
from language.offload.transfers import Transfer, Transfers

NAME = "offloaded"
Trace = Sequence[int]


@dataclass
class Counts:
    """What an offloaded model did.

    Attributes:
        hits: Uses of experts that were there, or on their way.
        loads: Experts that were requested from the store.
        bytes: Size of their slabs.
    """

    hits: int = 0
    loads: int = 0
    bytes: int = 0


class Offload:
    """The experts of one model: the store, the pool, the thread, a cache for each layer.

    Attributes:
        store: Where experts are read from.
        pool: Their slabs.
        transfers: The thread that reads them.
        layers: Layers with experts, in order.
        counts: Hits, loads and bytes since the beginning.
    """

    def __init__(
        self, store: ExpertStore, pool: SlabPool, caches: list[ExpertCache], patience: float
    ) -> None:
        self.store, self.pool, self.counts = store, pool, Counts()
        self.transfers = Transfers(store, pool, patience)
        self.lock = RLock()
        self.layers: list[OffloadedLayer] = []
        first = 0
        for cache in caches:
            self.layers.append(OffloadedLayer(self, len(self.layers), cache, first))
            first += cache.capacity

    def close(self) -> None:
        """End the thread and close the files; the model can no longer be called."""
        self.transfers.close()
        self.store.close()

    def __reduce__(self) -> NoReturn:
        raise GatesError(
            f"experts that stay in {self.store.folder} cannot be copied with their model:"
            " load_offloaded it again"
        )


class OffloadedLayer:
    """The experts of one layer: those that are there, and a window of those needed next.

    Attributes:
        slots: Slots of the pool that belong to the layer.
        cache: Which experts are there, and which leaves.
        loads: The transfer that filled, or fills, the slot of each expert of the cache.
    """

    def __init__(self, offload: Offload, index: int, cache: ExpertCache, first: int) -> None:
        self.offload, self.index, self.cache = offload, index, cache
        self.slots = range(first, first + cache.capacity)
        self.loads: dict[int, Transfer] = {}
        self._needed: list[int] = []
        self._admitted = 0
        self._now: Transfer | None = None

    def begin(self, needed: list[int]) -> None:
        """Prepare for experts that are needed one after the other, ascending."""
        self._settle(wait=True)
        self._needed, self._admitted, self._now = needed, 0, None

    def slab(self, expert: int) -> Tensor:
        """Return the slab of the expert that is needed now, and request those after it.

        Raises:
            GatesError: It cannot be read, or does not arrive.
        """
        now = self._now
        if now is None or now.expert != expert:
            self._leave()
            start = self._needed.index(expert)
            window = self._needed[start : start + len(self.slots)]
            while self._admitted < start + len(window):
                self._admit(self._needed[self._admitted], window)
                self._admitted += 1
            now = self.loads[expert]
            self.offload.transfers.wait(now)
            self.offload.pool.enter(now.slot)
            self._now = now
        return self.offload.pool.slabs[now.slot]

    def end(self) -> None:
        """Give up what is still on its way, after an error or an interrupt."""
        self._leave()
        self._settle(wait=False)

    def _leave(self) -> None:
        if self._now is not None:
            self.offload.pool.leave(self._now.slot)
        self._now = None

    def _admit(self, expert: int, window: list[int]) -> None:
        use = self.cache.use(expert, window)
        counts = self.offload.counts
        counts.hits += use.hit
        if use.hit:
            return
        if use.evicted is not None:
            del self.loads[use.evicted]
        taken = {load.slot for load in self.loads.values()}
        slot = next(slot for slot in self.slots if slot not in taken)
        name = f"expert {expert} of {self.offload.store.names[self.index]}"
        self.loads[expert] = self.offload.transfers.request(self.index, expert, slot, name)
        counts.loads += 1
        counts.bytes += self.offload.store.slab_bytes

    def _settle(self, wait: bool) -> None:
        """Forget what failed and what has not begun; wait for the one that is being read."""
        for expert, load in list(self.loads.items()):
            if not load.done.is_set() and not load.take():
                if not wait:
                    continue
                self.offload.transfers.settle(load)
            filled = load.done.is_set() and load.error is None
            if not filled or expert not in self.cache.resident:
                del self.loads[expert]
        for expert in self.cache.resident - self.loads.keys():
            self.cache.drop(expert)


class ExpertTable:
    """Stands where a fused parameter was: an index gives the tensor of one expert."""

    def __init__(self, layer: OffloadedLayer, tensor: SlabTensor) -> None:
        self.layer, self.tensor = layer, tensor

    def __getitem__(self, expert: int | Tensor) -> Tensor:
        return self.tensor.of(self.layer.slab(int(expert)))


def run_offloaded(
    self: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """Return what the eager experts of transformers return, bit for bit: their own loop runs.

    It goes through the experts in ascending order and indexes the tables that stand where the
    parameters were. More experts than slots are therefore read while earlier ones compute.

    Args:
        self: Experts of one layer, after :func:`attach_offload`.
        hidden_states: Tokens (T, D).
        top_k_index: Experts of each token (T, K), int64; indices beyond the last add nothing.
        top_k_weights: Weights of these experts (T, K).

    Raises:
        GatesError: An expert cannot be read or does not arrive; a gradient is asked for; the
            experts are not offloaded.
    """
    experts: Any = self
    layer: OffloadedLayer | None = getattr(experts, "offloaded", None)
    if layer is None:
        raise GatesError(f"{type(self).__name__} has no experts in a store: call attach_offload")
    if torch.is_grad_enabled() and (hidden_states.requires_grad or top_k_weights.requires_grad):
        raise GatesError("offloaded experts have no gradients: call the model in torch.no_grad()")
    if hidden_states.device != layer.offload.pool.slabs.device:
        raise GatesError(
            f"tokens are on {hidden_states.device}, slabs of experts on"
            f" {layer.offload.pool.slabs.device}: load the model on the device that it runs on"
        )
    needed = top_k_index.unique().tolist()
    with layer.offload.lock:
        try:
            layer.begin([expert for expert in needed if expert < experts.num_experts])
            eager: Any = type(experts).forward
            out: Tensor = eager.__wrapped__(experts, hidden_states, top_k_index, top_k_weights)
        finally:
            layer.end()
    return out


def attach_offload(
    model: nn.Module,
    folder: Path | str,
    *,
    budget: float,
    policy: str = "lru",
    allocation: str = "uniform",
    profile: Sequence[Trace] | None = None,
    patience: float = 60.0,
    device: torch.device | str | None = None,
) -> Offload:
    """Let a mixture model read its experts from a checkpoint, and delete their parameters.

    The model computes what it computed with ``experts_implementation="eager"``, bit for bit.

    Args:
        model: Model of transformers that runs experts by name, on the device that it stays on.
            The parameters of experts may be on the meta device.
        folder: Checkpoint of the model in safetensors, experts fused or one by one.
        budget: Bytes for experts; a float up to 1.0 is a fraction of the bytes of all experts.
        policy: Which expert leaves, one of ``language.offload.caches.POLICIES``.
        allocation: ``uniform`` or ``shallow``, how layers divide the budget.
        profile: For each layer its experts in order of use, for the policy ``static``.
        patience: Seconds after which a read that is waited for counts as stalled.
        device: Where the slabs are; where the parameters of the model are if not given.

    Returns:
        The experts of the model, also as ``model.offload``.

    Raises:
        GatesError: The model has no such experts; the folder lacks experts, or a shard is
            truncated; the budget is below the experts of one token for each layer.
    """
    check_positive(patience=patience)
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    modules = _fused_experts(model)
    store = ExpertStore(Path(folder), modules)
    owner: Any = model
    least = int(owner.config.get_text_config().num_experts_per_tok)
    available = store.nbytes * budget if isinstance(budget, float) and budget <= 1 else budget
    shares = _slots(store, int(available // store.slab_bytes), least, allocation)
    traces = profile or [()] * len(shares)
    if len(traces) != len(shares):
        raise GatesError(f"the profile has {len(traces)} layers, the model {len(shares)}")
    caches = [make_cache(policy, *one) for one in zip(shares, traces, strict=True)]
    pool = make_pool(sum(shares), store.slab_bytes, torch.device(device or owner.device))
    offload = Offload(store, pool, caches, patience)
    for layer, module in zip(offload.layers, modules.values(), strict=True):
        _hand_over(module, layer, store.tensors[layer.index])
    ALL_EXPERTS_FUNCTIONS[NAME] = run_offloaded
    owner.set_experts_implementation(NAME)
    owner.offload = offload
    return offload


def _slots(store: ExpertStore, budget: int, least: int, allocation: str) -> list[int]:
    layers = len(store.names)
    if budget < least * layers:
        raise GatesError(
            f"the budget holds {budget} experts of {store.slab_bytes:,} bytes, but {layers} layers"
            f" need {least} each: give at least {least * layers * store.slab_bytes:,} bytes"
        )
    experts = store.num_experts
    return allocate(allocation, budget, layers=layers, experts=experts, least=least)


def _fused_experts(model: nn.Module) -> dict[str, nn.Module]:
    """Modules whose class runs experts by name, with parameters (E, ...), by name.

    Raises:
        GatesError: There are none.
    """
    found = {
        name: module
        for name, module in model.named_modules()
        if hasattr(module, "is_transposed") and hasattr(type(module).forward, "__wrapped__")
    }
    if any(
        isinstance(getattr(module, "offloaded", None), OffloadedLayer) for module in found.values()
    ):
        raise GatesError("the experts of the model are offloaded already: load_offloaded another")
    if not found:
        raise GatesError(
            f"{type(model).__name__} has no experts that transformers runs by name: give a mixture"
            " model such as Mixtral, Qwen3-MoE, OLMoE, DeepSeek-V3 or GPT-OSS"
        )
    return found


def _hand_over(module: nn.Module, layer: OffloadedLayer, tensors: dict[str, SlabTensor]) -> None:
    experts: Any = module
    for name, tensor in tensors.items():
        delattr(experts, name)
        setattr(experts, name, ExpertTable(layer, tensor))
    experts.offloaded = layer
    experts.register_state_dict_pre_hook(_refuse_state)


def _refuse_state(module: Any, *_: object) -> NoReturn:
    folder = module.offloaded.offload.store.folder
    raise GatesError(f"the experts of the model stay in {folder}: copy this folder instead")
