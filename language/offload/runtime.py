"""Mixture models of transformers that read experts when tokens need them."""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from threading import RLock
from typing import Any, NoReturn, cast

import torch
from torch import Tensor, nn

from core_gates.errors import GatesError, check_positive
from language.offload.caches import ExpertCache, make_caches
from language.offload.expert_store import ExpertStore, SlabTensor
from language.offload.guesses import (
    ALIKE,
    Profile,
    RoutedTokens,
    cross_layer,
    fetched,
    make_predictor,
    rarest,
)
from language.offload.pool import PINNED, CudaPool, SlabPool, device_of
from language.offload.quantization import BITS, QuantizedStore
from language.offload.setup import ON_DEMAND, Setup, Sizes, Used
from language.offload.staging import Guesses, note_tokens
from language.offload.transfers import Transfer, Transfers

NAME = "offloaded"
Observer = Callable[[int, RoutedTokens], None]
"""Is told the layer and what its tokens need."""


@dataclass
class Counts(Used):
    """What an offloaded model did; ``bytes`` are those of all requests.

    Attributes:
        loads: Experts that were requested from the store because tokens needed them.
        guesses: Experts that were requested because they were guessed.
        unread: Bytes of these that were never read, as guesses were given up in time.
    """

    loads: int = 0
    guesses: int = 0
    unread: int = 0


class Offload:
    """The experts of one model: the store, the pool, the thread, a cache for each layer.

    Attributes:
        store: Where experts are read from.
        pool: Their slabs.
        transfers: The thread that reads them.
        layers: Layers with experts, in order.
        guesses: What is fetched before it is known to be needed.
        sizes: How many experts there are, and how large.
        counts: Hits, loads and bytes since the beginning.
        observers: Are told what the tokens of each layer need.
    """

    def __init__(
        self,
        store: ExpertStore,
        pool: SlabPool,
        caches: list[ExpertCache],
        guesses: Guesses,
        sizes: Sizes,
        patience: float,
    ) -> None:
        self.store, self.pool, self.counts, self.sizes = store, pool, Counts(), sizes
        self.transfers, self.guesses = Transfers(store, pool, patience), guesses
        self.lock = RLock()
        self.layers: list[OffloadedLayer] = []
        self.observers: list[Observer] = []
        first = len(guesses.free)
        for cache in caches:
            self.layers.append(OffloadedLayer(self, len(self.layers), cache, first))
            first += cache.capacity

    def guess(self, layer: int, needed: Sequence[int], seen: RoutedTokens) -> None:
        """Fetch what the next layer may need, after what this one needs.

        Args:
            layer: The layer whose experts are known.
            needed: Its experts that may still be among the guesses.
            seen: Its tokens.
        """
        guesses = self.guesses
        self.counts.unread += sum(map(self.store.transfer_bytes, guesses.keep(layer, needed)))
        if guesses.predict is None or layer + 1 == len(self.layers):
            return
        after = self.layers[layer + 1]
        ranked = guesses.predict(layer, seen).cpu()
        padding = guesses.padding if len(guesses.padding) == len(ranked) else None
        sizes, alike = self.sizes, guesses.alike
        order = fetched(ranked, sizes.k, guesses.width, sizes.experts, padding, alike=alike)
        hybrid = self.store.hybrid and guesses.prompt and not alike
        after.rare = rarest(order) if hybrid else set()
        for key in map(after.key_of, order):
            if key in after.loads or not guesses.free:
                continue
            one = Transfer(after.index, key, guesses.free[-1], after.name_of(key), guessed=True)
            guesses.staged[after.index, key] = one
            guesses.free.pop()
            self.transfers.request(one)
            self.counts.guesses += 1
            self.counts.bytes += self.store.transfer_bytes(key)

    def recover(self) -> None:
        """Give up all guesses after an error or an interrupt, wherever that was."""
        owned = {slot for layer in self.layers for slot in layer.slots}
        self.guesses.recover(one for one in range(len(self.pool.slabs)) if one not in owned)

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
        rare: Experts that travel in fewer bits now. Cache and transfers number them from the number
            of experts on, so that one in fewer bits never stands for one in more.
    """

    def __init__(self, offload: Offload, index: int, cache: ExpertCache, first: int) -> None:
        self.offload, self.index, self.cache = offload, index, cache
        self.slots = list(range(first, first + cache.capacity))
        self.loads: dict[int, Transfer] = {}
        self.rare: set[int] = set()
        self._needed: list[int] = []
        self._admitted = 0
        self._now: Transfer | None = None

    def name_of(self, expert: int) -> str:
        """Return the name of an expert for error messages."""
        store = self.offload.store
        return f"expert {expert % store.num_experts} of {store.names[self.index]}"

    def key_of(self, expert: int) -> int:
        """Return the number of an expert in cache and transfers: another if it is in few bits."""
        return expert + self.offload.store.num_experts * (expert in self.rare)

    def begin(self, needed: Sequence[int], seen: RoutedTokens) -> None:
        """Request experts that are needed one after the other, ascending, and guess the next."""
        self._settle(wait=True)
        self._needed, self._admitted, self._now = [*map(self.key_of, needed)], 0, None
        self._request(0)
        self.offload.guess(self.index, self._needed[self._admitted :], seen)

    def slab(self, expert: int) -> Tensor:
        """Return the slab of the expert that is needed now, and request those after it.

        Raises:
            GatesError: It cannot be read, or does not arrive.
        """
        now, key = self._now, self.key_of(expert)
        if now is None or now.expert != key:
            self._leave()
            self._request(self._needed.index(key))
            now = self.loads[key]
            if not now.filled:
                counts, begun = self.offload.counts, time.perf_counter()
                counts.late += now.guessed
                self.offload.transfers.wait(now)
                counts.stall += time.perf_counter() - begun
            self.offload.pool.enter(now.slot)
            self._now = now
        return self.offload.pool.slabs[now.slot]

    def _request(self, start: int) -> None:
        """Request what there are slots for, from one of the needed experts on."""
        window = self._needed[start : start + len(self.slots)]
        while self._admitted < start + len(window):
            self._admit(self._needed[self._admitted], window)
            self._admitted += 1

    def end(self) -> None:
        """Give up what is still on its way, after an error or an interrupt."""
        self._leave()
        self._needed = []
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
        if right := self.offload.guesses.staged.get((self.index, expert)):
            self.slots[self.slots.index(slot)] = right.slot
            self.loads[expert] = right
            self.offload.guesses.exchange(self.index, expert, slot)
            counts.guessed += 1
            return
        self.loads[expert] = Transfer(self.index, expert, slot, self.name_of(expert))
        self.offload.transfers.request(self.loads[expert])
        counts.loads += 1
        counts.bytes += self.offload.store.transfer_bytes(expert)

    def _settle(self, wait: bool) -> None:
        """Forget what failed and what has not begun; wait for the one that is being read."""
        for expert, load in list(self.loads.items()):
            if not load.done() and not load.cancel():
                if not wait:
                    continue
                self.offload.transfers.settle(load)
            if not load.filled or expert not in self.cache.resident:
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
    """Run the eager expert loop of transformers, with results equal to the bit.

    It goes through the experts in ascending order and indexes the tables that stand where the
    parameters were. More experts than slots are therefore read while earlier ones compute.

    Args:
        self: Experts of one layer, after `attach_offload`.
        hidden_states: Tokens (T, D).
        top_k_index: Experts of each token (T, K), int64; indices beyond the last add nothing.
        top_k_weights: Weights of these experts (T, K).

    Raises:
        GatesError: An expert cannot be read or does not arrive; weights are not finite; a gradient
            is asked for; the experts are not offloaded.
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
    stored = next(iter(layer.offload.store.tensors[layer.index].values())).dtype
    if hidden_states.dtype != stored and not torch.is_autocast_enabled(hidden_states.device.type):
        raise GatesError(
            f"tokens are {hidden_states.dtype}, experts {stored} as in"
            f" {layer.offload.store.folder}: leave the model in the dtype of its checkpoint"
        )
    if not top_k_weights.isfinite().all():
        raise GatesError(
            f"weights of {layer.offload.store.names[layer.index]} are not finite: the checkpoint or"
            " the input is wrong"
        )
    seen = RoutedTokens(
        top_k_index, layer.offload.guesses.tokens_of(len(top_k_index)), hidden_states
    )
    with layer.offload.lock:
        for observe in layer.offload.observers:
            observe(layer.index, seen)
        try:
            used = top_k_index.unique().tolist()
            layer.begin([one for one in used if one < experts.num_experts], seen)
            eager = type(experts).forward.__wrapped__
            out: Tensor = eager(experts, hidden_states, top_k_index, top_k_weights)
            layer.end()
        except BaseException:
            layer.end()
            layer.offload.recover()
            raise
    return out


def attach_offload(
    model: nn.Module,
    folder: Path | str,
    *,
    budget: float,
    setup: Setup = ON_DEMAND,
    profile: Profile | None = None,
    cache: Path | str | None = None,
    patience: float = 60.0,
    device: torch.device | str | None = None,
) -> Offload:
    """Let a mixture model read its experts from a checkpoint, and delete their parameters.

    The model computes what it computed with ``experts_implementation="eager"``, bit for bit, unless
    experts travel in few bits.

    Args:
        model: Model of transformers that runs experts by name; they may be on the meta device.
        folder: Checkpoint of the model in safetensors, experts fused or one by one.
        budget: Bytes for experts, pinned slabs included; a float up to 1.0 is a fraction of all.
        setup: How the budget is used.
        profile: What other tokens used, for the policy ``static`` and the predictors ``path``,
            ``frequency``, ``ngram`` and ``ngram-first``.
        cache: Folder of experts in few bits, written once; that of the checkpoint if None.
        patience: Seconds after which a read that is waited for counts as stalled.
        device: Where the slabs are; where the parameters of the model are if not given.

    Returns:
        The experts of the model, also as ``model.offload``.

    Raises:
        GatesError: The model has no such experts; the folder lacks some, has others than a model
            in memory, or a shard is truncated; the budget is too small; an option is wrong.
    """
    check_positive(patience=patience)
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    modules, owner = _fused_experts(model), cast(Any, model)
    place = device_of(device or owner.device)
    store = ExpertStore(Path(folder), modules)
    for index, module in enumerate(modules.values()):
        _require_equal(store, index, module)
    if bits := BITS.get(setup.transfer):
        store = QuantizedStore(Path(folder), modules, bits, Path(cache or folder))
    k, each = int(owner.config.get_text_config().num_experts_per_tok), store.slab_bytes
    weights = each // owner.dtype.itemsize
    sizes = Sizes(len(modules), store.num_experts, k, each, weights, store.digest)
    shares = setup.slots(_slabs(store, budget) - PINNED * (place.type == "cuda"), sizes)
    guesses = _guesses(setup, model, store, profile, sizes)
    caches = make_caches(setup.policy, shares, profile)
    slots = sum(shares) + guesses.width
    pool = CudaPool(slots, each, place) if place.type == "cuda" else SlabPool(slots, each)
    offload = Offload(store, pool, caches, guesses, sizes, patience)
    owner.register_forward_pre_hook(partial(note_tokens, offload), with_kwargs=True)
    for layer, module in zip(offload.layers, modules.values(), strict=True):
        _hand_over(module, layer, store.tensors[layer.index])
    ALL_EXPERTS_FUNCTIONS[NAME] = torch.compiler.disable(run_offloaded)
    owner.set_experts_implementation(NAME)
    owner.offload, owner.save_pretrained = offload, partial(_refuse_state, module)
    return offload


def _slabs(store: ExpertStore, budget: float) -> int:
    """Return how many slabs a budget holds."""
    known = isinstance(budget, int | float) and not isinstance(budget, bool)
    odd = isinstance(budget, float) and 1 < budget < store.slab_bytes  # bytes, fraction of bytes?
    if not known or odd or not 0 <= budget < math.inf:
        raise GatesError(
            f"the budget is {budget!r}, expected bytes, or a fraction of all experts up to 1.0"
        )
    available = store.nbytes * budget if isinstance(budget, float) and budget <= 1 else budget
    return int(available // store.slab_bytes)


def _guesses(
    setup: Setup, model: Any, store: ExpertStore, profile: Profile | None, sizes: Sizes
) -> Guesses:
    layers, most, digest = (
        (len(profile.routed), int(profile.routed.max()), profile.digest)
        if profile
        else (sizes.layers, 0, "")
    )
    if layers != sizes.layers or most >= sizes.experts or digest not in ("", sizes.digest):
        raise GatesError(
            f"the profile has {layers} layers and expert {most}, the model {sizes.layers} of"
            f" {sizes.experts} experts; weights are {digest or 'not known'} and {sizes.digest}:"
            " give one of this model"
        )
    width, ahead = setup.guesses(sizes.k, sizes.experts), None
    if setup.predictor in ("cross-layer", "ngram-first"):
        dim = model.config.get_text_config().hidden_size
        ahead = cross_layer(model, store.names, dim, width)
    predict = make_predictor(setup.predictor, sizes.experts, profile=profile, ahead=ahead)
    return Guesses(predict, width, range(width), alike=setup.predictor in ALIKE)


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


def _require_equal(store: ExpertStore, layer: int, module: nn.Module) -> None:
    """Refuse experts in memory that are not those of the folder, read one at a time.

    Raises:
        GatesError: Weights of one differ; or what reading raises.
    """
    own = {n: one for n, one in module.named_parameters(recurse=False) if not one.is_meta}
    slab = torch.empty(store.slab_bytes if own else 0, dtype=torch.uint8)
    for expert in range(max(map(len, own.values()), default=0)):
        try:
            store.read_into(layer, expert, slab.numpy().data)
        finally:
            store.close()
        for name, one in own.items():
            if not torch.equal(store.tensors[layer][name].of(slab), one.detach()[expert].cpu()):
                raise GatesError(
                    f"{store.folder} has other weights than the model for expert {expert} of"
                    f" {store.names[layer]}: save the model there before, or load_offloaded it"
                )


def _hand_over(module: nn.Module, layer: OffloadedLayer, tensors: dict[str, SlabTensor]) -> None:
    experts: Any = module
    for name, tensor in tensors.items():
        delattr(experts, name)
        setattr(experts, name, ExpertTable(layer, tensor))
    experts.offloaded = layer
    experts.register_state_dict_pre_hook(_refuse_state)
    experts.register_forward_pre_hook(_refuse_function)


def _refuse_function(module: Any, _: object) -> None:
    if (found := module.config._experts_implementation) != NAME:
        raise GatesError(
            f"only the function {NAME!r} reads experts that stay in a folder, not {found!r}: call"
            f" model.set_experts_implementation({NAME!r})"
        )


def _refuse_state(module: Any, *_: object, **__: object) -> NoReturn:
    raise GatesError(
        f"the experts of the model stay in {module.offloaded.offload.store.folder}: copy this"
        " folder instead"
    )
