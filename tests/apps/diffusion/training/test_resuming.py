"""All four verbs that train: killed at any moment, resumed bit for bit, found again."""

import pytest

RESULTS = {
    "train-base": "bases/*/result.safetensors",
    "train-lora": "loras/*/My-fruit.safetensors",
    "train-retriever": "table_encoders/*/encoder/encoder.safetensors",
    "train-gates": "table_gates/*/gates.safetensors",
}


@pytest.mark.parametrize("verb", RESULTS)
def test_a_killed_training_ends_with_the_same_bits(verb, kill_and_resume, forked, command, place):
    del place
    folder = kill_and_resume(
        command(verb, steps=10),
        app="diffusion",
        compare=[RESULTS[verb], "*/*/record.json"],
        start=forked.Forked,
    )
    root, name = str(folder.parents[1]), folder.name
    again = forked.finished([*command(verb, steps=10), "--root", root, "--name", name])
    assert len(again.splitlines()) == 1
    assert again.strip().startswith(str(folder))
