"""Generation through random faults: each is one error with its expert, and nothing is lost."""

import sys
import threading

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from core_gates.errors import GatesError
from language.offload.loading import load_offloaded
from language.offload.setup import Setup

K, LAYERS, SLAB, PATIENCE = 2, 3, 9216, 0.5
PROMPTS = torch.randint(64, (2, 1, 4), generator=torch.Generator().manual_seed(1))
FAULTS = st.tuples(st.sampled_from(["fail", "stall", "cancel"]), st.integers(1, 40))


class Cancelled(BaseException):
    """Raised where a user would interrupt."""


class Faults:
    """Fails or stalls at a read, or cancels at an activation, the ``left``-th from now."""

    def __init__(self, model):
        self.kind, self.left, self.at, self.stall = "", 0, "", threading.Event()
        self.slow, self.pause = threading.Event(), 0.001
        self.offload, self.read = model.offload, model.offload.store.read_into
        self.offload.store.read_into = self.read_into
        for block in model.model.layers:
            block.mlp.experts.act_fn.register_forward_pre_hook(self.activate)

    def begin(self, kind, left):
        self.kind, self.left, self.at = kind, left, ""
        self.stall.clear()
        self.offload.transfers.patience = PATIENCE if kind == "stall" else 60

    def counted(self, kinds):
        self.left -= self.kind in kinds
        return self.kind in kinds and self.left == 0

    def read_into(self, layer, expert, slab):
        if self.counted(("fail", "stall")):
            self.at = f"expert {expert} of model.layers.{layer}.mlp.experts"
            if self.kind == "fail":
                raise OSError("unplugged")
            self.stall.wait(30)
        self.slow.wait(self.pause)
        self.read(layer, expert, slab)

    def activate(self, *_):
        if self.counted(("cancel",)):
            self.at = "activation"
            raise Cancelled

    def line(self):
        ends = {"fail": "cannot be read: unplugged", "stall": "has not arrived in 0.5 seconds"}
        return f"{self.at} {ends[self.kind]}"


def tokens_of(model, ids=PROMPTS[0]):
    return model.generate(ids, max_new_tokens=4, do_sample=False)


def check_whole(offload):
    """Every slot has one owner, and what a cache holds is in a slot of its layer."""
    spare = [*offload.guesses.free, *(one.slot for one in offload.guesses.staged.values())]
    owned = [slot for layer in offload.layers for slot in layer.slots]
    assert sorted(spare + owned) == list(range(len(offload.pool.slabs)))
    for layer in offload.layers:
        taken = [one.slot for one in layer.loads.values()]
        assert len(taken) == len(set(taken))
        assert set(taken) <= set(layer.slots)
        assert layer.cache.resident == layer.loads.keys()


def workers():
    return sum(thread.name == "experts" for thread in threading.enumerate())


@settings(max_examples=10)
@given(
    faults=st.lists(FAULTS, min_size=1, max_size=4),
    policy=st.sampled_from(["lru", "lfu", "arc"]),
    slots=st.integers(K, 4),
    predictor=st.sampled_from(["none", "cross-layer"]),
)
def test_generation_goes_through_faults(checkpoint, resident, faults, policy, slots, predictor):
    whole, before = resident(checkpoint()), workers()
    expected, other = (tokens_of(whole, ids) for ids in PROMPTS)
    budget = (slots * LAYERS + K * (predictor != "none")) * SLAB
    setup = Setup(policy=policy, predictor=predictor)
    model = load_offloaded(checkpoint(), budget=budget, setup=setup)
    offload, faulty = model.offload, Faults(model)
    for kind, left in faults:
        faulty.begin(kind, left)
        raised: BaseException | None = None
        try:
            assert torch.equal(tokens_of(model), expected)
        except (GatesError, Cancelled) as error:
            raised = error
        if isinstance(raised, GatesError):
            assert str(raised).startswith(faulty.line())
            assert "\n" not in str(raised)
        elif raised is None:  # too late, or at an expert that was guessed and not used
            assert not faulty.at or (predictor != "none" and kind != "cancel")
        faulty.kind = ""
        faulty.stall.set()
        check_whole(offload)
        assert workers() == before + 1
        offload.transfers.patience = 60
        assert torch.equal(tokens_of(model, PROMPTS[1]), other)  # needs other experts
        assert torch.equal(tokens_of(model), expected)
        check_whole(offload)
    offload.close()
    assert workers() == before


def test_an_interrupt_at_any_line_loses_no_slot(checkpoint, resident):
    setup, ids = Setup(predictor="cross-layer"), PROMPTS[0][:, :1]
    expected = resident(checkpoint())(ids).logits
    model = load_offloaded(checkpoint(), budget=(K * LAYERS + K) * SLAB, setup=setup)
    offload, at = model.offload, {"left": 0}

    def trace(frame, event, _):
        if not frame.f_code.co_filename.endswith(("offload/runtime.py", "offload/staging.py")):
            return None
        if frame.f_code.co_name in ("end", "_leave", "_settle", "recover"):
            return None  # an interrupt of what follows an interrupt
        at["left"] -= event == "line"
        if event == "line" and at["left"] == 0:
            raise Cancelled
        return trace

    for number in range(1, 2000, 8):
        at["left"] = number
        sys.settrace(trace)
        try:
            model(ids)
        except Cancelled:
            pass
        finally:
            sys.settrace(None)
        check_whole(offload)
        if at["left"] > 0:
            break
    assert number > 100
    assert torch.equal(model(ids).logits, expected)
    offload.close()
