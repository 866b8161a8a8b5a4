"""A SeqBoat on two ranks, one of which activates nothing in every other step."""

import torch
from torch.nn.functional import cross_entropy

from language.seqboat.front_ends import SymbolEmbedding
from language.seqboat.sequence_model import SeqBoat, recorded

STEPS, BATCH, TOKENS = 10, 4, 9


def trained(parallel):
    torch.manual_seed(0)
    sizes = {"num_layers": 2, "key_dim": 4, "hidden_dim": 8, "num_states": 2, "window": 4}
    model = SeqBoat(SymbolEmbedding(8, 9), 3, **sizes).double()
    with torch.no_grad():
        for layer in model.blocks:
            layer.configurator.weight.normal_(std=20)
    wrapped = parallel(model)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2, betas=(0.9, 0.98))
    active = []
    for step in range(STEPS):
        draws = torch.Generator().manual_seed(step)
        x = torch.randint(9, (BATCH, TOKENS), generator=draws)
        mask = torch.arange(TOKENS) >= torch.randint(1, TOKENS, (BATCH, 1), generator=draws)
        mask[BATCH // 2 :] |= step % 2 == 1  # padding alone on the second rank
        labels = torch.randint(3, (BATCH,), generator=draws)
        x, mask, labels = map(parallel.share, (x, mask, labels))
        optimizer.zero_grad()
        with recorded(model) as passes:
            loss = cross_entropy(wrapped(x, padding_mask=mask), labels)
        loss.backward()
        optimizer.step()
        active.append(int(passes[0].active.sum()))
    assert any(active)
    return dict(model.state_dict())


def test_two_ranks_train_like_one_process(two_ranks):
    two_ranks(trained, tolerance=1e-10)
