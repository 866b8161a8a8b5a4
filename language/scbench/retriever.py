"""A model that surely retrieves: a Llama whose weights are written, not trained.

What a policy loses can be seen on a model alone that answers everything without it. This one copies
what follows a symbol, as two layers of attention that follow each other can (induction heads,
arXiv 2209.11895):

1. The first attends to the token before, by fast pairs of rotary features: all keys are the same
   vector, turned by one position against the queries. It adds the symbol that it finds there.
2. The second compares a symbol with that of the token before, by slow pairs, which do not see
   positions, and so attends to what followed the symbol earlier. It adds what it finds there.

The head reads this. So after a symbol comes what followed it in the context, then what followed
that, until a comma ends the answer. Any symbol may occur in a context once.
"""

import math

import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SYMBOLS, END = 8_192, ","
CONTEXT = 16_384
FEATURES = 64  # of the code of a symbol
_BLOCK = FEATURES + 1  # with that of the end
_HEAD, _THETA = 128, 1e12
_FAST = 12  # pairs that find the token before
_SHARPNESS = 24.0  # product of a query with its key, a fast pair or all slow ones
_COMMA = 4.0  # product of any query of the second layer with the key of a comma
_REPEATED = 0.125  # of its score the current symbol loses: the first token finds itself, too


def retriever() -> LlamaForCausalLM:
    """Return the model: 2 layers, one head of 128, 3.4 million weights, in evaluation mode.

    Its hidden state has the code of the token, of the token before, of the answer, and a constant.
    A symbol that is not in a context, or no longer, attends to commas there, and the answer is
    empty. Which of them it attends to most is as good as random: a policy that keeps half of the
    tokens by the attention of other symbols keeps the three symbols of an answer by chance.
    """
    codes, size = _codes(), 3 * _BLOCK + 1
    config = LlamaConfig(
        vocab_size=len(codes), hidden_size=size, intermediate_size=1, num_hidden_layers=2,
        num_attention_heads=1, num_key_value_heads=1, head_dim=_HEAD,
        max_position_embeddings=CONTEXT, tie_word_embeddings=False,
        rope_parameters={"rope_type": "default", "rope_theta": _THETA},
        bos_token_id=None, eos_token_id=SYMBOLS, pad_token_id=SYMBOLS,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        model = LlamaForCausalLM(config).eval().requires_grad_(False)
    norms = {name: weight for name, weight in model.named_parameters() if "norm" in name}
    for name, weight in model.named_parameters():
        weight.fill_(float(name in norms))
    token, before, answer = (slice(start * _BLOCK, (start + 1) * _BLOCK) for start in range(3))
    layers, unit = model.model.layers, math.sqrt(FEATURES)
    model.model.embed_tokens.weight[:, token] = codes
    model.model.embed_tokens.weight[:, -1] = unit
    model.lm_head.weight[:, token] = -_REPEATED * codes
    model.lm_head.weight[:, answer] = codes
    identity = torch.eye(_BLOCK)
    for number, layer in enumerate(layers):  # undo what the norm divides by: two codes, then three
        layer.input_layernorm.weight.fill_(unit * math.sqrt((2 + number) / size))
        layer.self_attn.v_proj.weight[:_BLOCK, token] = identity
        layer.self_attn.o_proj.weight[(before, answer)[number], :_BLOCK] = identity

    first, second = (layer.self_attn for layer in layers)
    half = _HEAD // 2
    pairs = torch.arange(_FAST)
    scale = math.sqrt(_SHARPNESS * math.sqrt(_HEAD))
    angles = _THETA ** (-2.0 * pairs.double() / _HEAD)  # of one position
    first.q_proj.weight[pairs, -1] = scale / unit
    first.k_proj.weight[pairs, -1] = (angles.cos() * scale / unit).float()
    first.k_proj.weight[pairs + half, -1] = (angles.sin() * scale / unit).float()

    feature = torch.arange(FEATURES)
    slow = feature % (half // 2) + half // 2 + feature // (half // 2) * half
    second.q_proj.weight[slow, feature] = scale / unit
    second.k_proj.weight[slow, feature + _BLOCK] = scale / unit
    commas = scale * math.sqrt(_COMMA / _SHARPNESS) / unit
    pair = half // 2 - 1  # the slowest that is left
    second.q_proj.weight[pair, -1] = second.k_proj.weight[pair, FEATURES] = commas
    return model


def retriever_tokenizer() -> PreTrainedTokenizerFast:
    """Return the tokenizer of `retriever`: a token a symbol, ``s0000`` to ``s8191``, and the end.

    All other text is dropped, so that the prompt of Retr.KV serves as published: the JSON of keys
    and values that are symbols has a token for each, and one for the comma after each value.
    """
    words = [*(f"s{number:04d}" for number in range(SYMBOLS)), END]
    vocabulary = {word: number for number, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=END))
    symbol_or_end = Regex(rf"s[0-9]{{4}}|{END}")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(symbol_or_end, "removed", invert=True)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END, pad_token=END, unk_token=END,
        model_max_length=CONTEXT, padding_side="left", clean_up_tokenization_spaces=False,
    )  # fmt: skip


def _codes() -> Tensor:
    """Return the codes (SYMBOLS + 1, FEATURES + 1) of all symbols and the end, of equal length.

    Those of symbols are the 8,192 signs (-1)^(Tr(ax + bx³) + c) of the elements x of GF(64): the
    product of two is -64, or at most 16, a quarter of their square (R. Gold, 1968).
    """
    powers = [1]
    while len(powers) < FEATURES - 1:
        doubled = powers[-1] << 1
        powers.append(doubled ^ 0b1000011 if doubled >= FEATURES else doubled)
    power = torch.tensor(powers)
    logarithm = torch.zeros(FEATURES, dtype=torch.long)
    logarithm[power] = torch.arange(len(power))
    element = torch.arange(FEATURES)
    product = power[(logarithm[:, None] + logarithm) % len(power)]
    product = product * (element[:, None] * element > 0)
    trace, conjugate = torch.zeros_like(element), element
    for _ in range(6):
        trace, conjugate = trace ^ conjugate, product[conjugate, conjugate]
    cube = product[product.diagonal(), element]
    linear, cubic = trace[product], trace[product[:, cube]]  # (a or b, x)
    bits = (linear[:, None] ^ cubic).flatten(0, 1)
    codes = torch.zeros(SYMBOLS + 1, _BLOCK)
    codes[:-1, :FEATURES] = 1.0 - 2 * torch.cat([bits, 1 - bits])
    codes[-1, -1] = math.sqrt(FEATURES)
    return codes
