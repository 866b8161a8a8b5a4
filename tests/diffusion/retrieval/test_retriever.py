"""Contrastive losses, and the training of an encoder."""

import math
import warnings

import pytest
import torch
from lightning import seed_everything
from torch.nn import functional as F

from diffusion.evaluation.retrieval_scores import search_values
from diffusion.lora_file import LoraBundle, LoraFileError
from diffusion.retrieval import (
    AdapterBatch,
    EncoderConfig,
    Example,
    LoraWeightEncoder,
    collate,
    load_encoder,
    save_encoder,
)
from diffusion.retrieval.retriever import ContrastiveLoss, LoraRetriever, PublishedLoss, positives
from diffusion.retrieval.retriever_data import Augmentation, RetrieverData, Rounds
from harness.runs.callbacks import RunCheckpoint
from harness.runs.loops import ExactTrainer
from harness.runs.terminal import UNWANTED

DIFFERENT = torch.arange(4)


def pairs(seed=0, count=4, dim=6):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(count, dim, generator=generator, dtype=torch.float64) for _ in range(2)]


def test_without_shared_concepts_it_is_the_mean_of_both_cross_entropies():
    text, lora = pairs()
    loss = ContrastiveLoss(scale=5.0).double()
    logits = 5 * F.normalize(text) @ F.normalize(lora).mT
    own = torch.arange(4)
    expected = (F.cross_entropy(logits, own) + F.cross_entropy(logits.mT, own)) / 2
    torch.testing.assert_close(loss(text, lora, DIFFERENT, DIFFERENT), expected, rtol=1e-6, atol=0)
    published = PublishedLoss()(text, lora, DIFFERENT, DIFFERENT)
    logits = logits / 5
    expected = 10 * (F.cross_entropy(logits, own) + F.cross_entropy(logits.mT, own))
    torch.testing.assert_close(published, expected, rtol=1e-6, atol=0)


def test_one_adapter_or_concept_twice_is_no_negative():
    match = positives(torch.tensor([0, 1, 0, 2]), torch.tensor([5, 6, 5, 6]), slice(0, 4))
    assert match.int().tolist() == [[1, 0, 1, 0], [0, 1, 0, 1], [1, 0, 1, 0], [0, 1, 0, 1]]
    text = F.normalize(torch.eye(2, dtype=torch.float64)[[0, 0, 1]])
    loss = ContrastiveLoss(scale=100.0).double()
    numbers, concepts = torch.tensor([0, 1, 2]), torch.tensor([0, 0, 1])
    # Two right ones that are equally near: the floor is the entropy of the target.
    floor = 2 / 3 * math.log(2)
    assert loss(text, text, numbers, concepts).item() == pytest.approx(floor, rel=1e-6)
    assert loss(text, text, numbers, numbers).item() == pytest.approx(floor, rel=1e-6)
    apart = F.normalize(text + 0.3 * torch.eye(3, 2, dtype=torch.float64).flip(0))
    same = loss(apart, apart, numbers, concepts)
    different = loss(apart, apart, numbers, numbers)
    assert same.item() != pytest.approx(different.item(), rel=1e-3)


def test_the_scale_starts_at_its_value_and_stays_below_100():
    loss = ContrastiveLoss()
    assert loss.scale.item() == pytest.approx(1 / 0.07, rel=1e-6)
    with torch.no_grad():
        loss.log_scale.fill_(10.0)
    assert loss.scale.item() == pytest.approx(100)
    loss.limit()
    assert loss.log_scale.item() == pytest.approx(math.log(100))
    with pytest.raises(ValueError, match="scale"):
        ContrastiveLoss(scale=0)


def step(parallel, batch, text, numbers, concepts, weights, settings):
    """The loss and the gradients of one step over all ranks."""
    from torch import distributed as dist
    from torch import nn

    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder = LoraWeightEncoder(EncoderConfig.from_state(settings)).double()
            self.loss = ContrastiveLoss().double()

        def forward(self, batch, text, numbers, concepts):
            return self.loss(text, self.encoder(batch), numbers, concepts)

    both = Both()
    both.load_state_dict(weights)
    wrapped = parallel(both)
    own = parallel.share(torch.arange(len(text)))
    loss = wrapped(AdapterBatch(*batch).rows(own), text[own], numbers[own], concepts[own])
    loss.backward()
    total = loss.detach().clone()
    if dist.is_initialized():
        dist.all_reduce(total)
        total /= dist.get_world_size()
    gradients = {name: p.grad for name, p in both.named_parameters() if p.grad is not None}
    return {"loss": total, **gradients}


def test_two_ranks_see_each_others_negatives(two_ranks, adapter, config):
    torch.manual_seed(0)
    settings = config(missing="mask")
    encoder = LoraWeightEncoder(settings).double()
    weights = {f"encoder.{name}": value for name, value in encoder.state_dict().items()}
    weights["loss.log_scale"] = torch.tensor(2.0, dtype=torch.float64)
    bundles = [adapter(seed, dtype=torch.float64) for seed in range(6)]
    batch = tuple(collate(bundles, encoder.modules_read, torch.float64))
    text = torch.randn(6, 24, dtype=torch.float64)
    numbers, concepts = torch.tensor([0, 1, 2, 3, 1, 5]), torch.tensor([0, 1, 2, 0, 1, 4])
    arguments = (batch, text, numbers, concepts, weights, settings.state())
    found = two_ranks(step, *arguments, tolerance=1e-6)
    assert found["loss.log_scale"].abs() > 1e-6
    assert found["encoder.final_linear.weight"].abs().max() > 1e-4


class KilledError(Exception):
    pass


def trainer(folder, epochs=1, **options):
    for message in UNWANTED:
        warnings.filterwarnings("ignore", message=message)
    return ExactTrainer(
        max_epochs=epochs, accelerator="cpu", devices=1, default_root_dir=folder, logger=False,
        enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0,
        **{"callbacks": [RunCheckpoint(every_n_steps=1)], **options},
    )  # fmt: skip


def test_rounds_go_through_all_adapters():
    torch.manual_seed(0)
    drawn = [number for batch in Rounds(5, 2, 5) for number in batch]
    assert sorted(drawn[:5]) == sorted(drawn[5:]) == [0, 1, 2, 3, 4]
    assert [sorted(batch) for batch in Rounds(3, None, 2)] == [[0, 1, 2]] * 2
    assert len(next(iter(Rounds(3, 7, 1)))) == 7
    assert len({str([*Rounds(9, 9, 1)]) for _ in range(5)}) == 5  # epochs differ


def test_ranks_share_each_batch(monkeypatch):
    monkeypatch.setattr("diffusion.retrieval.retriever_data.num_ranks", lambda: 2)
    torch.manual_seed(0)
    batches = list(Rounds(7, None, 7))
    assert ({len(batch) for batch in batches}, len(set(batches[0]))) == ({6}, 6)
    assert sorted([number for batch in batches for number in batch]) == sorted([*range(7)] * 6)


def test_parts_of_ranks_make_up_the_batch_of_one(examples, config, words, monkeypatch):
    adapters = RetrieverData(examples, config(), words).training
    torch.manual_seed(0)
    whole = adapters[[3, 1, 0, 2]]
    monkeypatch.setattr("diffusion.retrieval.retriever_data.num_ranks", lambda: 2)
    for rank in range(2):
        monkeypatch.setattr("diffusion.retrieval.retriever_data.rank_in", lambda rank=rank: rank)
        torch.manual_seed(0)
        part, own = adapters[[3, 1, 0, 2]], slice(2 * rank, 2 * rank + 2)
        assert torch.equal(part.numbers, whole.numbers[own])
        assert torch.equal(part.text, whole.text[own])
        assert torch.equal(part.adapters.present, whole.adapters.present[own])


@pytest.mark.parametrize("in_memory", [True, False])
def test_validation_in_parts_is_that_of_all(examples, config, words, in_memory):
    torch.manual_seed(0)
    data = RetrieverData(
        examples, config(), words, validation=examples, batch_size=3, in_memory=in_memory
    )
    module, logged = LoraRetriever(config()).eval(), {}
    module.log_dict = lambda values, **_: logged.update(values)
    loader = data.val_dataloader()
    assert len(loader) == (1 if in_memory else -(-len(examples) // 3))
    module.on_validation_epoch_start()
    for number, pairs in enumerate(loader):
        module.validation_step(pairs, number)
    module.on_validation_epoch_end()
    assert float(logged["val_recall@1"]) == pytest.approx(recall(module, data), abs=1e-6)


def test_data_in_memory_and_from_files_are_the_same(examples, config, words):
    found = []
    for in_memory in (True, False):
        data = RetrieverData(
            examples, config(), words, batch_size=3, steps_per_epoch=2, in_memory=in_memory
        )
        torch.manual_seed(0)
        found.append(list(data.train_dataloader()))
    assert len(found[0]) == 2
    for first, second in zip(*found, strict=True):
        assert torch.equal(first.text, second.text)
        assert torch.equal(first.numbers, second.numbers)
        name = "transformer_blocks.0.attn.to_q"
        assert torch.equal(first.adapters.down[name], second.adapters.down[name])
        near = [F.cosine_similarity(words.direction(f"c{n}"), text, dim=0)
                for n, text in zip(first.numbers, first.text, strict=True)]  # fmt: skip
        assert min(near) > 0.5


def test_what_cannot_be_trained(examples, config, words, adapter, one_line):
    def refused(given, settings):
        return one_line(LoraFileError, RetrieverData, given, settings, words)

    assert "there is no adapter" in refused([], config())
    assert "set text_dim to 24" in refused(examples, config(text_dim=32))
    other = Example(adapter(0, types=("proj_out",)), ["c0 1"], "odd")
    assert "adapter 9 (odd)" in refused([*examples, other], config(types=("ff_a.0",)))
    zero = LoraBundle("flux", {n: f._replace(scale=0.0) for n, f in adapter(0).modules.items()})
    assert "are zero" in refused([*examples, Example(zero, ["c0 1"], "nothing")], config())
    with pytest.raises(ValueError, match="batch_size"):
        RetrieverData(examples, config(), words, batch_size=0)


def test_a_killed_and_resumed_run_has_the_same_bits(examples, config, words, tmp_path):
    from lightning import Callback

    class Kill(Callback):
        def on_train_batch_start(self, trainer, *_):
            if trainer.global_step == 5:
                raise KilledError

    def run(folder, *, kill=False, resume=None):
        seed_everything(0, verbose=False)
        settings = config(missing="mask")
        data = RetrieverData(examples, settings, words, batch_size=3, steps_per_epoch=4)
        module = LoraRetriever(settings, augmentation=Augmentation())
        callbacks = [RunCheckpoint(every_n_steps=1), *([Kill()] if kill else [])]
        fitter = trainer(folder, epochs=2, callbacks=callbacks)
        fitter.fit(module, data, ckpt_path=resume, weights_only=True)
        return module.state_dict()

    whole = run(tmp_path / "whole")
    with pytest.raises(KilledError):
        run(tmp_path / "killed", kill=True)
    resumed = run(tmp_path / "killed", resume=str(tmp_path / "killed/checkpoints/last.ckpt"))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    other = run(tmp_path / "other", resume=None)
    assert all(torch.equal(whole[name], other[name]) for name in whole)


@pytest.mark.parametrize("loss", ["contrastive", pytest.param("published", marks=pytest.mark.slow)])
def test_unseen_adapters_of_known_concepts_are_found(loss, zoo, config, words, tmp_path):
    seed_everything(0, verbose=False)
    known, unseen = zoo(8, 2)
    examples = [
        Example(bundle, [f"c{c} {k}" for k in range(8)], f"c{c}") for c, bundle in enumerate(known)
    ]
    held_out = [
        Example(bundle, [f"c{c} new{k}" for k in range(8)], f"c{c}")
        for c, bundle in enumerate(unseen)
    ]
    settings = config()
    data = RetrieverData(examples, settings, words, validation=held_out, steps_per_epoch=40)
    module = LoraRetriever(settings, loss=loss, learning_rate=5e-3)
    fitter = trainer(tmp_path)
    before = recall(module, data)
    fitter.fit(module.train(), data)
    after = recall(module, data)
    assert before < 0.4
    assert after > (0.9 if loss == "contrastive" else 0.6)
    assert fitter.callback_metrics["val_recall@1"].item() == pytest.approx(after, abs=1e-6)
    stored = load_encoder(save_encoder(tmp_path / "encoder", module.encoder, dtype=torch.bfloat16))
    vectors = torch.stack([stored.encode(example.bundle) for example in held_out])
    text, owners = data.validation.captions.all()
    assert ((text @ vectors.mT).argmax(1) == owners).float().mean() > after - 0.1


def whole(adapters):
    """All adapters with all of their captions."""
    return adapters.part(range(len(adapters)))


def recall(module, data):
    module.eval()
    pairs = whole(data.validation)
    with torch.no_grad():
        scores = pairs.text @ module(pairs).mT
    relevant = pairs.owners[:, None] == torch.arange(scores.shape[1])
    return search_values(scores, relevant)["recall@1"].mean()
