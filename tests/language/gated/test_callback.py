"""Output gates in the checkpoints of a Trainer that trains an adapter of PEFT."""

import copy
import warnings

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import Trainer, TrainingArguments

from core_gates.errors import GatesError
from language.gated.attach import attach_output_gate, output_gates
from language.gated.callback import FILE, GateCallback
from language.gated.state import load_gates, save_gates

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
STEPS, HALF = 6, 3


@pytest.fixture
def adapted(tiny):
    """``adapted(adapter="default")``: a model with an adapter and gates, both to be trained."""

    def build(adapter="default"):
        model = get_peft_model(tiny("Llama"), LoraConfig(target_modules=["o_proj"]), adapter)
        attach_output_gate(model, granularity="headwise")
        return model

    return build


@pytest.fixture
def trainer_of(tmp_path):
    """``trainer_of(model, **options)``: trains on one sequence, with a checkpoint at half."""
    rows = torch.randint(1, 64, (STEPS * 2, 9), generator=torch.Generator().manual_seed(1))
    data = [{"input_ids": row, "labels": row} for row in rows]

    def build(model, callbacks=(), name="run", **options):
        settings = {
            **{"max_steps": STEPS, "save_steps": HALF, "per_device_train_batch_size": 2},
            **{"learning_rate": 0.05, "use_cpu": True, "report_to": "none", "disable_tqdm": True},
            **{"logging_strategy": "no", "dataloader_pin_memory": False},
        }
        args = TrainingArguments(output_dir=str(tmp_path / name), **(settings | options))
        parts = {"train_dataset": data, "eval_dataset": data[:2], "callbacks": [*callbacks]}
        return Trainer(model, args, **parts)

    return build


def trained_of(model):
    """Return what is trained, by name."""
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def gates_of(model):
    return {name: tensor for name, tensor in trained_of(model).items() if "output_gate" in name}


def same(found, expected):
    assert found.keys() == expected.keys()
    return all(torch.equal(found[name], value) for name, value in expected.items())


@pytest.mark.fault("46 A2")
@pytest.mark.parametrize("adapter", ["default", "mine"])
def test_a_resumed_training_ends_with_the_same_bits(adapter, adapted, trainer_of, tmp_path):
    whole = adapted(adapter)
    start = gates_of(whole)
    trainer_of(whole, [GateCallback()]).train()
    assert not same(gates_of(whole), start)
    half = tmp_path / "run" / f"checkpoint-{HALF}"
    assert (half / FILE).is_file()
    resumed = adapted(adapter)
    trainer_of(resumed, [GateCallback()]).train(resume_from_checkpoint=str(half))
    expected = trained_of(whole)
    assert sum("lora" in name for name in expected) == 4
    assert sum("output_gate" in name for name in expected) == 4
    assert same(trained_of(resumed), expected)
    folder = half.with_name(f"checkpoint-{STEPS}")
    base = adapted(adapter).unload()
    again = PeftModel.from_pretrained(base, folder / adapter.removeprefix("default"))
    load_gates(again, folder / FILE)
    tokens = torch.arange(1, 9).unsqueeze(0)
    with torch.no_grad():
        assert torch.equal(again.eval()(tokens).logits, whole.eval()(tokens).logits)


@pytest.mark.fault("46 A2")
def test_the_best_gates_are_those_at_the_end(adapted, trainer_of, tmp_path):
    """The loss to be beaten is that of the first checkpoint; training goes uphill from there."""
    model, losses = adapted(), iter([1.0, 2.0])
    options = {"eval_strategy": "steps", "eval_steps": HALF, "load_best_model_at_end": True}
    trainer = trainer_of(model, [GateCallback()], metric_for_best_model="eval_loss", **options)
    evaluate = trainer.evaluate

    def measured(*args, **kwargs):
        return evaluate(*args, **kwargs) | {"eval_loss": next(losses)}

    trainer.evaluate = measured
    trainer.train()
    best, last = adapted(), adapted()
    load_gates(best, tmp_path / "run" / f"checkpoint-{HALF}" / FILE)
    load_gates(last, tmp_path / "run" / f"checkpoint-{STEPS}" / FILE)
    assert same(gates_of(model), gates_of(best))
    assert not same(gates_of(best), gates_of(last))


@pytest.mark.fault("46 A2")
def test_an_adapter_saved_without_its_trained_gates_is_one_warning(adapted, tmp_path, trainer_of):
    model = adapted()
    with pytest.warns(UserWarning, match=r"^PEFT saves adapters without .*[^\n]*$") as said:
        model.save_pretrained(tmp_path / "bare")
    assert len(said) == 1
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        save_gates(model, tmp_path / FILE)
        copy.deepcopy(model).get_base_model().state_dict()
        model.requires_grad_(False)
        model.save_pretrained(tmp_path / "frozen")
        kept = adapted()
        trainer_of(kept, [GateCallback()], "kept").save_model(str(tmp_path / "kept"))
    assert not [one for one in said if "output gates" in str(one.message)]
    assert (tmp_path / "kept" / FILE).is_file()


@pytest.mark.fault("46 A2")
def test_what_cannot_keep_gates_is_refused_or_told(adapted, tiny, tmp_path, trainer_of, refuses):
    model = adapted()
    late = trainer_of(model)
    late.add_callback(GateCallback())
    refuses(
        GatesError,
        ("not kept: attach them first, then give Trainer", late.train),
        ("has no output gates", lambda: trainer_of(tiny("Llama"), [GateCallback()])),
    )
    with pytest.warns(UserWarning, match="PEFT saves"):
        model.save_pretrained(tmp_path / "bare")
    trainer_of(model, [GateCallback()])
    before = gates_of(model)
    with pytest.warns(UserWarning, match=r"bare holds no gates.safetensors, so that the output"):
        model.load_adapter(tmp_path / "bare", "default")
    assert same(gates_of(model), before)
    whole = tiny("Llama")
    attach_output_gate(whole)
    trainer_of(whole, [GateCallback()]).save_model(str(tmp_path / "whole"))
    assert not (tmp_path / "whole" / FILE).exists()
    assert len(output_gates(whole)) == 2
