"""``generate``, ``convert`` and ``plan``: what they print and write."""

import json
import math
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import core_gates.ops.flops  # noqa: F401
from apps.language import commands, model_sizes, training_verbs
from apps.language import generate as app
from apps.language.generate import models_in, shipped
from apps.language.model_sizes import Size, decoder_cost, plan
from apps.language.seqboat import training as seqboat_training
from core_gates import GatesError
from harness.command.configfile import read_config
from harness.planning import Device
from language.corpus import Document
from language.generation import generate
from language.hf.model_folder import read_model
from language.scoring import bits_per_byte
from language.tokenizer import ByteTokenizer

END = ByteTokenizer.end


def texts_of(folder, prompts, **options):
    """What the library adds to prompts."""
    model, tokenizer = read_model(folder)
    tokens = [[END, *tokenizer.encode(prompt).tolist()] for prompt in prompts]
    found = [""] * len(prompts)
    for chunk in generate(model, tokens, decode=tokenizer.decode, end=END, **options):
        found[chunk.prompt] += chunk.text
    return found


def test_a_prompt_is_continued_to_the_same_text(trained, weights):
    options = {"max_tokens": 6, "temperature": 0.8, "top_k": 40, "top_p": 0.9, "seed": 5}
    words = [word for name, value in options.items() for word in (f"--{name}", value)]
    (added,) = texts_of(weights, ["def a"], **options)
    assert added
    assert trained.succeed("generate", "--prompt", "def a", *words) == f"def a{added}\n"
    named = trained.succeed("generate", "--prompt", "def a", "--weights", weights, *words,
                            config=None)  # fmt: skip
    assert named == f"def a{added}\n"


def test_a_continuation_ends_before_its_stop(trained, weights):
    greedy = {"max_tokens": 8, "temperature": 0.0}
    (whole,) = texts_of(weights, ["def "], **greedy)
    words = ["--max_tokens", 8, "--temperature", 0, "--stop", whole[2:4]]
    found = trained.succeed("generate", "--prompt", "def ", *words)
    assert found == f"def {whole[: whole.index(whole[2:4])]}\n"


def test_every_line_of_a_file_is_continued(trained, weights, tmp_path):
    prompts = ["de", "    return a", "x"]
    (tmp_path / "prompts.txt").write_text("\n".join(prompts) + "\n")
    words = ["--prompts", tmp_path / "prompts.txt", "--max_tokens", 3, "--seed", 1]
    out = trained.succeed("generate", *words)
    added = texts_of(weights, prompts, max_tokens=3, seed=1)
    lines = [f"[{n}] {p}{a}\n" for n, (p, a) in enumerate(zip(prompts, added, strict=True), 1)]
    assert all(line in out for line in lines)
    assert len(out) == sum(map(len, lines))


def test_a_converted_folder_computes_the_same(trained, weights, tmp_path):
    out = trained.succeed("convert", weights, "--output", tmp_path / "copy", config=None)
    assert out.splitlines()[-1] == str(tmp_path / "copy")
    tokens = torch.arange(12).view(1, -1)
    model, _ = read_model(weights)
    copy, _ = read_model(tmp_path / "copy")
    with torch.no_grad():
        assert torch.equal(copy(tokens), model(tokens))
    words = ["--output", tmp_path / "copy", "--dtype", "bfloat16", "--overwrite_output"]
    trained.succeed("convert", weights, *words, config=None)
    half, _ = read_model(tmp_path / "copy")
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    assert json.loads((tmp_path / "copy/config.json").read_text())["dtype"] == "bfloat16"


@pytest.fixture
def published(tmp_path):
    """A Llama of transformers, whose first token is none of its two last ones, and its folder."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path / "published"
    ByteTokenizer().save(folder)
    content = json.loads((folder / "tokenizer.json").read_text())
    added = content["added_tokens"][0]
    content["added_tokens"] = [
        {**added, "id": 256 + n, "content": text} for n, text in enumerate(("<s>", "</s>"))
    ]
    (folder / "tokenizer.json").write_text(json.dumps(content))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>"}))
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=258, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=16, bos_token_id=256, eos_token_id=257,
        initializer_range=0.5,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    free = greedy(model, "a = ", eos_token_id=-1)
    last = next(token for n, token in enumerate(free) if n > 1 and token not in free[:n])
    model.generation_config.eos_token_id = [257, last]
    model.save_pretrained(folder)
    return model, folder


def greedy(model, prompt, **options):
    """The tokens that transformers adds to a prompt after the first token."""
    start = torch.tensor([[256, *prompt.encode()]])
    options = {"do_sample": False, "max_new_tokens": 10, "pad_token_id": 0, **options}
    found = model.generate(start, attention_mask=torch.ones_like(start), **options)
    return found[0, start.shape[1] :].tolist()


@pytest.mark.fault("language 3")
def test_a_published_model_begins_and_ends_where_it_does_in_transformers(
    trained, published, tmp_path
):
    model, folder = published
    *added, last = greedy(model, "a = ")
    assert last in model.generation_config.eos_token_id
    assert len(added) < 9
    expected = "a = " + bytes(added).decode(errors="replace") + "\n"
    words = ("--prompt", "a = ", "--temperature", 0, "--max_tokens", 10, "--weights")
    assert trained.succeed("generate", *words, folder, config=None) == expected
    trained.succeed("convert", folder, "--output", tmp_path / "copy", config=None)
    assert trained.succeed("generate", *words, tmp_path / "copy", config=None) == expected
    own, copy = (json.loads((f / "config.json").read_text()) for f in (folder, tmp_path / "copy"))
    assert [copy[f"{name}_token_id"] for name in ("bos", "eos")] == [256, 257]
    assert [own[f"{name}_token_id"] for name in ("bos", "eos")] == [256, 257]
    name = "generation_config.json"
    assert (tmp_path / "copy" / name).read_bytes() == (folder / name).read_bytes()


@pytest.mark.fault("language 3")
@pytest.mark.parametrize("token", ["2", -1, [2, True]])
def test_a_folder_with_a_last_token_that_is_none_is_refused(trained, published, token):
    (published[1] / "generation_config.json").write_text(json.dumps({"eos_token_id": token}))
    result = trained("language", "generate", "--prompt", "a", "--weights", published[1])
    assert result.code == 2
    assert "names the token" in result.err


@pytest.mark.fault("language 9")
@pytest.mark.parametrize("text", ["# a", "~", "null"])
def test_prompts_and_stops_are_literal(trained, text):
    (trained.folder / "prompt.txt").write_text(text)
    words = ("--max_tokens", 2)
    out = trained.succeed("generate", "--prompt", text, *words)
    assert trained.succeed("generate", "--prompts", "prompt.txt", *words) == f"[1] {out}"
    assert trained.succeed("generate", f"--prompt={text}", *words) == out


@pytest.mark.fault("language 9")
def test_a_stop_is_literal(published, trained):
    words = ("--prompt", "a = ", "--weights", published[1])
    with pytest.MonkeyPatch.context() as patch:
        seen = []
        patch.setattr(app, "continued", lambda *_, stop, **__: seen.append(stop) or [])
        trained.succeed("generate", *words, "--stop", "# x", config=None)
        trained.succeed("generate", *words, "--stop", "null", config=None)
        trained.succeed("generate", *words, config=None)
    assert seen == [("# x",), ("null",), ()]


@pytest.mark.fault("language 19")
def test_prompts_are_split_at_line_feeds_alone(trained):
    (trained.folder / "lines.txt").write_bytes("\ufeffa\u2028b\x0cc\nd\n".encode())
    out = trained.succeed("generate", "--prompts", "lines.txt", "--max_tokens", 1)
    assert "[1] a\u2028b\x0cc" in out
    assert "[2] d" in out


@pytest.mark.fault("language 19")
def test_an_error_has_its_own_line(trained, weights, tmp_path):
    shutil.copytree(weights, tmp_path / "broken")
    path = tmp_path / "broken/model.safetensors"
    state = {name: value.fill_(math.nan) for name, value in load_file(path).items()}
    save_file(state, path)
    words = ("generate", "--prompt", "a", "--weights", tmp_path / "broken")
    result = trained("language", *words)
    assert (result.code, result.out) == (2, "a\n")


@pytest.mark.fault("language 2")
def test_only_a_model_is_replaced(trained, weights, tmp_path):
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes/a.txt").write_text("mine")
    words = ("--overwrite_output", "--output")
    result = trained("language", "convert", weights, *words, tmp_path / "notes")
    assert result.code == 2
    assert "holds 'a.txt', which is no older output" in result.err
    assert (tmp_path / "notes/a.txt").read_text() == "mine"
    for output in (".", "/"):
        refused = trained("language", "convert", weights, "--output", output)
        assert refused.code == 2
        assert " exists: choose another --output" in refused.err


@pytest.mark.fault("language 13")
def test_a_model_of_a_run_that_was_changed_is_not_used(trained, weights):
    path = weights / "config.json"
    content = path.read_text()
    path.write_text(content.replace("10000.0", "100.0"))
    try:
        result = trained("language", "generate", "--config", "small", "--prompt", "a")
    finally:
        path.write_text(content)
    assert result.code == 2
    assert "config.json was changed after record.json was written" in result.err


@pytest.fixture
def planned(tmp_path, monkeypatch):
    """``plan`` of a size that a real step has, too."""
    monkeypatch.setitem(model_sizes.SIZES, "gpt_moe_tiny", Size(4, 32, 48, 2))
    monkeypatch.setattr(model_sizes, "CONTEXT", 20)
    monkeypatch.setattr(model_sizes, "VOCABULARY", 50)
    place = SimpleNamespace(run_folder=SimpleNamespace(path=tmp_path))

    def run(size="gpt_moe_tiny", **options):
        plan(place, size=size, **options)
        content = json.loads((tmp_path / f"plan-{size}.json").read_text())
        return {
            section.removeprefix(f"{size}: "): {name: one["value"] for name, one in lines.items()}
            for section, lines in content.items()
        }

    return run


def test_a_plan_counts_what_a_real_step_does(planned):
    found = planned(experts=4, batch_size=2, gpus=1)
    model, _ = decoder_cost("gpt_moe_tiny", 4)
    model = model.to_empty(device="cpu")
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.1)
    tokens = torch.randint(50, (2, 21))
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        loss = F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
        forward = counter.get_total_flops()
        loss.backward()
    per_token = found["arithmetic of a token"]
    assert per_token["forward"] * 40 == pytest.approx(forward, rel=1e-3)
    again = 4 * 2 * 2 * 20**2 * 32  # scores, which fused attention computes again in each block
    training = counter.get_total_flops() + again
    assert per_token["training"] * 40 == pytest.approx(training, rel=1e-3)


def test_weights_have_their_closed_form(planned):
    found = planned(experts=4)["network"]
    dim, wide, layers, experts = 32, 32, 4, 4
    attention, mlp, norms = 4 * dim**2, 3 * dim * wide, 2 * dim
    dense = layers * (attention + norms) + layers // 2 * mlp + 50 * dim + dim
    moe = layers // 2 * (experts * mlp + experts * dim)
    assert found["parameters"] == dense + moe
    assert found["used by a token"] == dense + layers // 2 * (mlp + experts * dim)
    whole = planned(experts=4, gpus=4, sharded=True)
    spread = whole["memory of each of 4 GPUs"]
    assert spread["bf16 copies of weights"] == 2 * (dense + moe)
    assert spread["total"] == sum(spread.values()) - spread["total"]
    used = whole["memory of a forward pass"]
    assert used["total"] == 6 * (dense + moe) + used["activations"]
    assert spread["weights"] == dense + moe
    assert spread["gathered weights"] == 8 * max(50 * dim, attention + norms + 4 * mlp + 4 * dim)


def test_full_precision_needs_no_copies(planned):
    found = planned(experts=4, precision="fp32")
    assert "bf16 copies of weights" not in found["memory of each of 8 GPUs"]


def test_the_price_is_that_of_the_devices_while_they_compute(planned):
    found = planned(experts=4, gpus=4, device=Device(price=3.0))[
        "rate, if the device is as assumed"
    ]
    hours = 1e9 / found["tokens a second"] / 3600
    assert found["price of 10^9 tokens"] == pytest.approx(3.0 * 4 * hours)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"size": "gpt_moe_huge"}, "--size is 'gpt_moe_huge'; choose one of gpt_moe_small, gpt_"),
        ({"gpus": 0}, "--gpus is 0, expected 1 to 1,000,000"),
        ({"batch_size": 10**12}, "--batch_size is 1000000000000, expected 1 to"),
        ({"experts": 0}, "--experts is 0"),
    ],
)
def test_impossible_plans(refuses, planned, options, words):
    refuses(GatesError, (words, lambda: planned(**options)))


def test_the_decoder_that_ships_reads_python():
    model, tokenizer = read_model(models_in(shipped())[0])
    text = Path(__file__).read_text()[:3000]
    documents = [Document("as it is", text), Document("in capitals", text.upper())]
    bits, sizes = bits_per_byte(model.float(), tokenizer, documents).T
    assert bits[0] / sizes[0] < 2.4 < 2.9 < bits[1] / sizes[1]


@pytest.mark.fault("46 H7")
def test_a_configuration_names_its_study_by_one_key(monkeypatch, refuses, tmp_path):
    ran = []
    monkeypatch.setattr(
        commands, "run_verb", lambda _app, verbs, _words, **_: ran.append(verbs["evaluate"].target)
    )
    monkeypatch.setattr(training_verbs, "run_training_verb", lambda words: ran.append("bytes"))
    monkeypatch.setattr(seqboat_training, "run_training_verb", lambda words: ran.append("seqboat"))
    studies = {"seer_smollm2": "seer.study", "sora": "adapter_study"}
    studies |= {"offload": "offload.budget_study", "scbench": "scbench.reuse_study"}
    for path in (Path(commands.__file__).parent / "configs").glob("*.yaml"):
        commands.main(["evaluate", "--config", path.stem])
        named = studies.get(path.stem)
        other = "seqboat" if "language.seqboat" in str(read_config(path)) else "bytes"
        assert ran.pop() == (f"apps.language.{named}:evaluate" if named else other)
    commands.main(["evaluate", "--study", "offload"])
    assert ran.pop() == "apps.language.offload.budget_study:evaluate"
    own = tmp_path / "own.yaml"
    own.write_text("evaluate: {study: [offload], budgets: [0.5]}\n")
    unnamed = tmp_path / "unnamed.yaml"
    unnamed.write_text("evaluate: {model: experts, budgets: [0.5]}\n")
    known = "choose one of bytes, blocks, adapters, offload, scbench$"
    refuses(
        GatesError,
        (rf"^study is 'blok'; {known}", lambda: commands.main(["evaluate", "--study=blok"])),
        (rf"^study is \['offload'\]; {known}", lambda: commands.main(["evaluate", "-c", str(own)])),
        (
            "unnamed.yaml: its section `evaluate` has a model and no study: add `study: blocks`, ",
            lambda: commands.main(["evaluate", "-c", str(unnamed)]),
        ),
    )
    assert not ran


@pytest.mark.fault("46 H7")
def test_the_help_of_evaluate_lists_the_studies(trained):
    told = " ".join(trained.succeed("evaluate", "--help", config=None).split())
    for study in ("bytes", "blocks", "adapters", "scbench", "offload"):
        other = " ".join(
            trained.succeed("evaluate", "--study", study, "--help", config=None).split()
        )
        assert f"--study {{{study}}}" in other or study == "bytes"
        assert study in told.split("--study {bytes,blocks,adapters,offload,scbench}")[1]
    assert "--budgets" in other
    assert "--budgets" not in told
