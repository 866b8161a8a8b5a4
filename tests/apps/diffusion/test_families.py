"""``gates diffusion merge`` on files of every family, compared with sums of what they store."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from apps.main import main

TEXT = "text_model.encoder.layers.0.self_attn.q_proj"
SPELLED = {
    "kohya": ("lora_down.weight", "lora_up.weight"),
    "peft": ("lora_A.weight", "lora_B.weight"),
}
KOHYA_TEXT = TEXT.replace(".", "_")
FILES = {  # layers of a file: outputs, and the shape of an input
    "sd1": {
        "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn2_to_k": (12, 768),
        "lora_unet_mid_block_attentions_0_proj_in": (8, 8, 1, 1),
        "lora_unet_up_blocks_3_resnets_1_conv1": (6, 4, 3, 3),
        "lora_unet_down_blocks_0_downsamplers_0_conv": (4, 4, 3, 1),
        f"lora_te_{KOHYA_TEXT}": (8, 8),
    },
    "sdxl": {
        "lora_unet_input_blocks_4_1_transformer_blocks_1_attn1_to_out_0": (12, 12),
        "lora_unet_output_blocks_0_1_transformer_blocks_9_attn2_to_v": (12, 2048),
        "lora_unet_middle_block_0_in_layers_2": (6, 4, 3, 3),
        "lora_unet_label_emb_0_0": (8, 8),
        f"lora_te1_{KOHYA_TEXT}": (8, 8),
        f"lora_te2_{KOHYA_TEXT}": (8, 8),
    },
    "sdxl peft": {
        "unet.down_blocks.1.attentions.0.transformer_blocks.1.attn1.to_out.0": (12, 12),
        "unet.up_blocks.0.attentions.0.transformer_blocks.9.attn2.to_v": (12, 2048),
        "unet.mid_block.resnets.0.conv1": (6, 4, 3, 3),
        "unet.add_embedding.linear_1": (8, 8),
        f"text_encoder.{TEXT}": (8, 8),
        f"text_encoder_2.{TEXT}": (8, 8),
    },
    "flux": {
        "lora_unet_double_blocks_0_img_attn_qkv": (48, 16),
        "lora_unet_double_blocks_1_txt_mlp_2": (16, 64),
        "lora_unet_single_blocks_0_linear1": (112, 16),
        "lora_unet_final_layer_adaLN_modulation_1": (32, 16),
        f"lora_te1_{KOHYA_TEXT}": (8, 8),
    },
    "flux peft": {
        "transformer.transformer_blocks.0.attn.to_q": (16, 16),
        "transformer.transformer_blocks.0.attn.to_k": (16, 16),
        "transformer.single_transformer_blocks.0.proj_out": (16, 80),
        "transformer.single_transformer_blocks.0.norm.linear": (48, 16),
    },
    "sd3": {
        "lora_unet_joint_blocks_0_x_block_attn_qkv": (48, 16),
        "lora_unet_joint_blocks_1_context_block_adaLN_modulation_1": (32, 16),
        "lora_unet_joint_blocks_0_x_block_mlp_fc1": (64, 16),
    },
    "wan": {
        "lora_unet_blocks_0_self_attn_q": (16, 16),
        "lora_unet_blocks_11_ffn_0": (32, 16),
    },
    "wan peft": {
        "diffusion_model.blocks.0.self_attn.q": (16, 16),
        "diffusion_model.blocks.11.ffn.0": (32, 16),
    },
}  # fmt: skip


def drawn(family, seed, *, layers=slice(None), ranks=(2, 3), alpha=None):
    """Random factors of mixed ranks; kohya's names have α."""
    generator, tensors = torch.Generator().manual_seed(seed), {}
    for number, (layer, (outputs, *inputs)) in enumerate([*FILES[family].items()][layers]):
        rank = ranks[number % len(ranks)]
        kohya = layer.startswith("lora_") if alpha is None else alpha
        down, up = SPELLED["kohya" if kohya else "peft"]
        ones = (1, 1) if len(inputs) == 3 else ()
        tensors[f"{layer}.{down}"] = torch.randn(rank, *inputs, generator=generator)
        tensors[f"{layer}.{up}"] = torch.randn(outputs, rank, *ones, generator=generator)
        if kohya:
            tensors[f"{layer}.alpha"] = torch.tensor(1.0 + number)
    return tensors


def changes(tensors):
    """ΔW of each layer as it is named, in float64, kernels flattened."""
    found = {}
    for key, down in tensors.items():
        if (end := key.rpartition(".lora_")[2]) not in ("down.weight", "A.weight"):
            continue
        layer = key.removesuffix(f".lora_{end}")
        up = tensors[f"{layer}.lora_{'up' if 'down' in end else 'B'}.weight"].flatten(1).double()
        scale = float(tensors.get(f"{layer}.alpha", torch.tensor(len(down)))) / len(down)
        found[layer] = scale * up @ down.flatten(1).double()
    return found


def worst(found, wanted):
    assert found.keys() == wanted.keys()
    return max(float((found[n] - wanted[n]).abs().max() / wanted[n].abs().max()) for n in wanted)


def total(files, weights):
    """The weighted sum of ΔW, layer by layer."""
    by_layer = {}
    for tensors, weight in zip(files, weights, strict=True):
        for layer, change in changes(tensors).items():
            by_layer[layer] = by_layer.get(layer, 0) + weight * change
    return by_layer


@pytest.fixture
def merged(gates):
    """Merge files of tensors and return what is written."""

    def run(files, *words):
        names = []
        for number, tensors in enumerate(files):
            names.append(f"{'abc'[number]}.safetensors")
            save_file(tensors, names[-1], {"mark": names[-1], "modelspec.license": "MIT"})
        gates("merge", *names, "--output", "out.safetensors", "--overwrite_output", *words)
        return load_file("out.safetensors")

    return run


def test_the_change_is_the_sum_in_the_dialect_of_the_first_file(merged, gates, tmp_path):
    for family in FILES:
        files = [drawn(family, 0, layers=slice(0, -1)), drawn(family, 1, ranks=(1, 4))]
        out = merged(files, "--method", "weighted", "--weights", "a:0.7,b:-1.5")
        assert worst(changes(out), total(files, (0.7, -1.5))) <= 1e-6, family
        assert {key: tensor.shape[2:] for key, tensor in out.items()} == {
            key: tensor.shape[2:] for key, tensor in files[1].items()
        }
        with safe_open("out.safetensors", "pt") as file:
            assert file.metadata()["mark"] == "a.safetensors"
        gates("inspect", "out.safetensors", "--json", "found.json", "--overwrite_output")
        (entry,) = json.loads((tmp_path / "found.json").read_text())["files"]
        assert (entry["family"], entry["left_out"]) == (family.split()[0], {})


def renamed(tensors, family, other):
    """The same factors under the names of another dialect."""
    names = dict(zip(FILES[family], FILES[other], strict=True))
    ends = dict(zip(SPELLED["kohya"], SPELLED["peft"], strict=True))
    return {
        f"{names[key.split('.')[0]]}.{ends[key.partition('.')[2]]}": tensor
        for key, tensor in tensors.items()
        if not key.endswith("alpha")
    }


def test_layers_of_another_dialect_get_the_names_of_the_first(merged):
    sgm, peft = drawn("sdxl", 0, alpha=False), drawn("sdxl peft", 1)
    sgm = {key.replace("lora_A", "lora_down").replace("lora_B", "lora_up"): tensor
           for key, tensor in sgm.items()}  # fmt: skip
    twin = renamed(sgm, "sdxl", "sdxl peft")
    assert worst(changes(merged([peft, sgm])), total([peft, twin], (1, 1))) <= 1e-6
    found = changes(merged([sgm, peft]))
    assert found.keys() == FILES["sdxl"].keys()
    back = dict(zip(FILES["sdxl peft"], FILES["sdxl"], strict=True))
    wanted = {back[layer]: change for layer, change in total([peft, twin], (1, 1)).items()}
    assert worst(found, wanted) <= 1e-6


def test_a_core_of_locon_is_folded_into_the_kernel(merged):
    layer, generator = "lora_unet_up_blocks_3_resnets_1_conv1", torch.Generator().manual_seed(0)
    shapes = {"lora_down": (2, 4, 1, 1), "lora_mid": (2, 2, 3, 3), "lora_up": (6, 2, 1, 1)}
    cored = {f"{layer}.{role}.weight": torch.randn(shape, generator=generator)
             for role, shape in shapes.items()}  # fmt: skip
    down, core, up = (tensor.double() for tensor in cored.values())
    change = torch.einsum("or,rsyx,si->oiyx", up[..., 0, 0], core, down[..., 0, 0]).flatten(1)
    plain = drawn("sd1", 1)
    wanted = total([plain], (1,))
    wanted[layer] += change
    assert worst(changes(merged([plain, cored])), wanted) <= 1e-6


def test_lower_ranks_are_the_best_approximation_for_every_family(gates):
    for family in ("sd1", "sdxl peft", "flux", "wan"):
        tensors = drawn(family, 0, ranks=(3, 4))
        save_file(tensors, "a.safetensors", {"mark": "a"})
        for words in (("--rank", 2), ("--energy", 0.8)):
            gates("resize", "a.safetensors", "b.safetensors", *words, "--overwrite_output")
            small, whole = changes(load_file("b.safetensors")), changes(tensors)
            for layer, change in whole.items():
                squares = torch.linalg.svdvals(change).square()
                kept = (squares.cumsum(0) < 0.8 * squares.sum()).sum() + 1
                best = squares[2 if "--rank" in words else kept :].sum().sqrt()
                error = (small[layer] - change).norm()
                assert abs(error - best) <= 1e-5 * change.norm(), layer
            with safe_open("b.safetensors", "pt") as file:
                assert file.metadata()["mark"] == "a"


def test_lenient_merges_list_what_is_left_out(gates):
    save_file(whole := drawn("sd1", 0), "a.safetensors")
    partner = next(name for name in whole if "lora_up" in name)
    save_file({n: t for n, t in whole.items() if n != partner}, "b.safetensors")
    printed = gates("merge", "a.safetensors", "b.safetensors", "--output", "o.safetensors",
                    "--lenient")  # fmt: skip
    lines = [line for line in printed.splitlines() if line.startswith("left out: b: ")]
    assert len(lines) == 2  # the factor down and its α
    assert all("lacks the factor up" in line for line in lines)
    assert not [line for line in printed.splitlines() if line.startswith("left out: a: ")]


def test_a_resized_file_keeps_the_numbers_of_the_file(gates):
    tensors = {name: tensor.bfloat16() for name, tensor in drawn("flux", 0, ranks=(4, 4)).items()}
    save_file(tensors, "a.safetensors")
    for words, dtype in (((), torch.bfloat16), (("--dtype", "fp32"), torch.float32)):
        gates("resize", "a.safetensors", "b.safetensors", "--rank", 2, *words,
              "--overwrite_output")  # fmt: skip
        found = load_file("b.safetensors")
        assert {t.dtype for name, t in found.items() if "weight" in name} == {dtype}


def test_the_blocks_of_every_family_are_shown_with_rank_and_norm(gates, tmp_path):
    save_file(drawn("sd1", 0), "a.safetensors")
    save_file(drawn("wan peft", 0), "b.safetensors")
    printed = gates("inspect", "a.safetensors")
    assert "4 of the U-Net, 1 of text_encoder" in printed
    blocks = [line.split("│")[1].strip() for line in printed.splitlines() if "_block" in line]
    assert blocks == ["down_blocks.0", "down_blocks.1", "mid_block", "up_blocks.3"]
    gates("inspect", "a.safetensors", "b.safetensors", "--json", "found.json")
    one, two = json.loads((tmp_path / "found.json").read_text())["files"]
    found = changes(load_file("a.safetensors"))["lora_unet_up_blocks_3_resnets_1_conv1"]
    assert one["norms"]["up_blocks.3"] == pytest.approx(float(found.norm()), rel=1e-5)
    assert [*two["norms"]] == ["blocks.0", "blocks.11"]
    assert two["layers"]["blocks.11.ffn.0"]["rank"] == 3


OF_DIFFUSERS = ("flux", "flux peft", "sd3")  # families whose loader of diffusers was measured


def test_the_answer_is_of_the_family_of_the_file_and_damage_comes_first(gates, tmp_path):
    (tmp_path / "all").mkdir()
    for family in FILES:
        tensors = drawn(family, 0)
        save_file(tensors, tmp_path / "all" / f"{family}.safetensors")
        up = next(name for name in tensors if "up.weight" in name or "lora_B" in name)
        tensors[up] = torch.full_like(tensors[up], torch.nan)
        save_file(tensors, tmp_path / "all" / f"{family} nan.safetensors")
        (line,) = [line for line in gates("inspect", f"all/{family}.safetensors").splitlines()
                   if line.startswith("answer: ")]  # fmt: skip
        assert ("diffusers" in line) == (family in OF_DIFFUSERS)
        said = f"adapter for {family.split()[0]}: load it into a model of that family"
        assert (said in line) == (family not in OF_DIFFUSERS)
    printed = gates("inspect", "all", "--json", "found.json")
    (line,) = [line for line in printed.splitlines() if "holds NaN" in line]
    assert line.startswith(f"flux nan.safetensors and {len(FILES) - 1} more: ")
    for entry in json.loads((tmp_path / "found.json").read_text())["files"]:
        assert (entry["answer"]["effect"] == "broken") == ("nan" in entry["file"])


def test_blocks_have_factors(merged):
    files = [drawn("sd1", 0), drawn("sd1", 1)]
    whole = total(files, (1, 1))
    found = changes(merged(files, "--blocks", "in:2,mid:0,out:.5"))
    factors = {"lora_unet_down": 2, "lora_unet_up_b": 0.5, "lora_te_text_m": 1}
    wanted = {n: factors[n[:14]] * c for n, c in whole.items() if n[:14] in factors}
    assert worst(found, wanted) <= 1e-6


def test_negative_factors_of_blocks_are_strengths(merged, gates):
    for family, block, text in (("flux", "double", "double:-1"), ("flux peft", "to_", "double:-1"),
                                ("sd1", "_down_", "in:-1")):  # fmt: skip
        files = [drawn(family, 0), drawn(family, 1)]
        found = changes(merged(files, f"--blocks={text}"))
        wanted = total(files, (1, 1))
        wanted = {n: -change if block in n else change for n, change in wanted.items()}
        assert worst(found, wanted) <= 1e-6, family
        gates("resize", "out.safetensors", f"{family}.safetensors", "--rank", 1)  # it is readable


def test_the_format_that_files_already_have_keeps_all_names(merged, gates, capsys):
    formats = {"sdxl peft": "diffusers", "flux peft": "diffusers", "wan peft": "comfyui"}
    for family in FILES:
        files, to = [drawn(family, 0), drawn(family, 1)], formats.get(family, "kohya")
        assert worst(changes(merged(files, "--to", to)), total(files, (1, 1))) <= 1e-6, family
        gates("convert", "a.safetensors", "same.safetensors", "--to", to, "--overwrite_output")
        same = load_file("same.safetensors")
        assert same.keys() == files[0].keys(), family
        assert worst(changes(same), changes(files[0])) <= 1e-6, family
        words = ("a.safetensors", "other.safetensors", "--to", "bfl")
        if family not in OF_DIFFUSERS:
            assert main(["diffusion", "convert", *words]) == 2
            assert f"is an adapter for {family.split()[0]}" in capsys.readouterr().err


def test_a_fused_layer_next_to_separate_ones_is_not_repeated(gates):
    kohya, parts = "lora_unet_double_blocks_0_img_attn_qkv", {}
    save_file(drawn("flux", 0, layers=slice(1), ranks=(4,)), "kohya.safetensors")
    for number, one in enumerate("qkv"):
        layer = f"transformer.transformer_blocks.0.attn.to_{one}"
        drawn_parts = drawn("flux peft", number + 1, layers=slice(1), ranks=(4,))
        parts |= {f"{layer}.{key.partition('.to_q.')[2]}": t for key, t in drawn_parts.items()}
    save_file(parts, "parts.safetensors")
    wanted = changes(load_file("kohya.safetensors"))[kohya] + torch.cat([*changes(parts).values()])
    for names in (("kohya", "parts"), ("parts", "kohya")):
        files = [f"{name}.safetensors" for name in names]
        gates("merge", *files, "--output", "out.safetensors", "--to", "kohya",
              "--overwrite_output")  # fmt: skip
        found = load_file("out.safetensors")
        assert len(found[f"{kohya}.lora_down.weight"]) == 16  # 4 for all, 4 for each
        assert worst(changes(found), {kohya: wanted}) <= 1e-6
        gates("convert", "out.safetensors", "back.safetensors", "--overwrite_output")
        back = {n: t for n, t in load_file("back.safetensors").items() if "lora_A" in n}
        assert [len(down) for down in back.values()] == [8, 8, 8]


def test_a_merged_or_resized_file_is_called_by_its_own_name(gates):
    for name, told in (("a", {"ss_output_name": "first"}), ("b", {})):
        save_file(drawn("sd1", 0), f"{name}.safetensors", told)
    for call, wanted in (
        (("merge", "a.safetensors", "b.safetensors", "--output", "v1.5.safetensors"), "v1.5"),
        (("merge", "b.safetensors", "a.safetensors", "--output", "none.safetensors"), None),
        (("merge", "a.safetensors", "b.safetensors", "--output", "v1.6", "--to", "peft",
          "--lenient"), "v1.6"),
        (("resize", "a.safetensors", "small.safetensors", "--rank", 1), "small"),
        (("resize", "b.safetensors", "nothing.safetensors", "--rank", 1), None),
    ):  # fmt: skip
        place = gates(*call).splitlines()[-1]
        place += "/adapter_model.safetensors" if call[-1] == "--lenient" else ""
        with safe_open(place, "pt") as file:
            assert file.metadata().get("ss_output_name") == wanted, call


FAULTS = {
    **{
        f"blocks {text!r}": (
            [drawn(family, 0), drawn(family, 0)],
            f"--blocks is {text!r}, expected blocks with factors, such as {example}",
            f"--blocks={text}",
        )
        for family, text, example in (
            ("sd1", "in", "in:0.5,mid:0.5,out:0.5"), ("sd1", "", "in:0.5"), ("sd1", "in:1,", "in"),
            ("flux", "1,2", "double:0.5,single:0.5"), ("flux", "double:1,single", "double:0.5"),
            ("sd3", "some text", "joint:0.5"), ("sd3", "joint", "joint:0.5"),
        )
    },
    "blocks NaN": (
        [drawn("sd1", 0)] * 2, "--blocks gives 'in' the strength 'nan', expected a finite number",
        "--blocks=in:nan",
    ),
    "blocks without the number": (
        [drawn("sd1", 0)] * 2, "--blocks gives 'in' the strength ''", "--blocks=in:",
    ),
    "unknown block": (
        [drawn("sd1", 0), drawn("sd1", 0)], "--blocks names 'inn', which is none of the blocks",
        "--blocks=inn:1",
    ),
    "blocks of a family that is not known": (
        [drawn("wan", 0), drawn("wan", 0)], "the blocks of wan are not known", "--blocks=in:1"
    ),
    "rank 0": ([drawn("sd1", 0)] * 2, "--rank is 0", "--method=svd", "--rank=0"),
    "energy 0": ([drawn("sd1", 0)] * 2, "--energy is 0.0", "--method=svd", "--energy=0"),
    "energy above 1": ([drawn("sd1", 0)] * 2, "--energy is 2.0", "--method=svd", "--energy=2"),
    "different bases": ([drawn("sd1", 0), drawn("sdxl", 0)], "'a' for sd1, 'b' for sdxl"),
    "a factor without its partner": (
        [drawn("sd1", 0), {k: t for k, t in drawn("sd1", 0).items() if "conv1.lora_up" not in k}],
        "conv1.alpha: its layer lacks the factor up",
    ),
    "alpha of another shape": (
        [drawn("sd1", 0), drawn("sd1", 0)
         | {"lora_unet_up_blocks_3_resnets_1_conv1.alpha": torch.ones(2)}],
        "α has the shape (2,), expected one number",
    ),
    "unequal kernels": (
        [drawn("sd1", 0), drawn("sd1", 0) | {
            "lora_unet_down_blocks_0_downsamplers_0_conv.lora_down.weight": torch.ones(3, 4, 1, 3)
        }],
        "kernels of down_blocks.0.downsamplers.0.conv are unequal: 3x1 in 'a', 1x3 in 'b'",
    ),
    "names that no table translates": (
        [drawn("wan peft", 0), {k.replace("diffusion_model.", "lora_unet_").replace(".", "_", 3): t
                           for k, t in drawn("wan peft", 1, alpha=True).items()}],
        "'b' has a layer lora_unet_blocks_0_self_attn_q.alpha, named otherwise",
    ),
    "a kind without kernel": (
        [drawn("sd1", 0), {f"lora_unet_up_blocks_0_resnets_0_conv1.hada_{one}": torch.ones(2, 2)
                           for one in ("w1_a", "w1_b", "w2_a", "w2_b")}],
        "'b' holds factors of loha, which tell no kernel",
    ),
    "a format": (
        [drawn("sd1", 0)] * 2, "found sd1 with other names than those of comfyui", "--to=comfyui"
    ),
    "a format of other prefixes": (
        [drawn("sdxl peft", 0)] * 2, "--to is for flux and sd3, found sdxl with", "--to=kohya"
    ),
    "a format with alpha": (
        [drawn("sdxl", 0)] * 2, "sdxl with other names than those of diffusers", "--to=diffusers"
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_what_cannot_be_merged_says_why_in_one_line(fault, samples, capsys, tmp_path):
    files, words, *options = FAULTS[fault]
    for name, tensors in zip("ab", files, strict=True):
        save_file(tensors, f"{name}.safetensors")
    call = ["diffusion", "merge", "a.safetensors", "b.safetensors", "--output", "out.safetensors"]
    assert main([*call, *options]) == 2
    line = capsys.readouterr().err
    assert words in line
    assert line.count("\n") == 1
    assert not (tmp_path / "out.safetensors").exists()
