"""Tokens of adapters at the end of a prompt."""

import torch

from diffusion.lora_file import LoraFileError
from diffusion.retrieval import with_adapters


def test_tokens_follow_the_prompt_scaled(one_line):
    prompt, tokens = torch.randn(2, 5, 8, dtype=torch.bfloat16), torch.randn(3, 8)
    found = with_adapters(prompt, tokens, 0.5)
    assert found.shape == (2, 8, 8)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found[:, :5], prompt)
    assert torch.equal(found[1, 5:], (0.5 * tokens).bfloat16())
    assert "8 features" in one_line(LoraFileError, with_adapters, prompt[..., :4], tokens)
