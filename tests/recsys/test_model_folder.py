import json
import shutil
import sys
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

import recsys.models
from core_gates.errors import GatesError
from recsys.model_folder import load_model, save_model
from recsys.ranker import Ranker

from .conftest import TOY


class Transform:
    """Stands in for a fitted transform."""

    def __init__(self, sizes=None):
        self.schema, self.sizes, self.dense_width = TOY["schema"](), sizes or TOY["SIZES"], 4

    def save(self, folder):
        folder.mkdir()
        (folder / "vocabulary.json").write_text(json.dumps(self.sizes))

    @classmethod
    def load(cls, folder):
        return cls(json.loads((folder / "vocabulary.json").read_text()))


@pytest.fixture(autouse=True)
def _stand_ins(monkeypatch):
    def build(name, options, input_dim, tasks, *, device=None):
        if name != "Toy":
            raise GatesError(f"there is no network {name!r}")
        return TOY["ToyNet"](input_dim, tasks, **options)

    monkeypatch.setattr(recsys.models, "build", build, raising=False)
    monkeypatch.setitem(
        sys.modules, "recsys.transform", SimpleNamespace(FeatureTransform=Transform)
    )


def ranker(**options):
    torch.manual_seed(0)
    options = {"hidden": 5, "copies": 2, "prior_dim": 10} | options
    further = {"prior": ("user", "city"), "encoders": {"watched": {"heads": 2}}}
    made = Ranker.build(TOY["schema"]("transformer"), TOY["SIZES"], 4, "Toy", options, **further)
    made.train()(*TOY["rows"](64))  # running statistics
    return made.eval()


@pytest.fixture(scope="module")
def schema_transform():
    made = Transform()
    made.schema = TOY["schema"]("transformer")
    return made


@pytest.fixture
def folder(tmp_path, schema_transform):
    return save_model(tmp_path / "model", ranker(), schema_transform, {"lr": 0.1, "seed": 3})


def test_a_round_trip_is_bit_equal(folder):
    expected, rows = ranker(), TOY["rows"](20)
    state = torch.get_rng_state()
    found = load_model(folder)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(found.ranker(*rows), expected(*rows))
    assert not found.ranker.training
    assert found.ranker.state_dict().keys() == expected.state_dict().keys()
    for name, value in expected.state_dict().items():
        assert torch.equal(found.ranker.state_dict()[name], value), name
    assert found.settings == {"lr": 0.1, "seed": 3}
    assert (found.transform.sizes, found.ranker.schema) == (TOY["SIZES"], expected.schema)
    assert (found.ranker.prior, found.versions["torch"]) == (expected.prior, str(torch.__version__))
    assert len(found.hash) == 64


def test_intercepts_are_kept(schema_transform, tmp_path):
    calibrated = ranker()
    calibrated.register_buffer("intercepts", torch.tensor([0.5, -0.25, 0.0]))
    found = load_model(save_model(tmp_path / "model", calibrated, schema_transform)).ranker
    rows = TOY["rows"](20)
    assert torch.equal(found.intercepts, calibrated.intercepts)
    assert torch.equal(found(*rows), calibrated(*rows))
    assert not torch.equal(found(*rows), ranker()(*rows))


@pytest.mark.parametrize(("tables", "net", "less"), [
    ("int8", "float32", 0.25), ("bfloat16", "bfloat16", 0.45), ("int8", "bfloat16", 0.5),
])  # fmt: skip
def test_small_files_give_nearly_the_same(folder, schema_transform, tmp_path, tables, net, less):
    rows, whole = TOY["rows"](20), load_model(folder).ranker
    small = save_model(tmp_path / "s", ranker(), schema_transform, tables=tables, net=net)
    sizes = [_size_of_weights(path) for path in (small, folder)]
    assert sizes[0] < (1 - less) * sizes[1]
    found = load_model(small).ranker
    assert 0 < float((found(*rows) - whole(*rows)).abs().max().detach()) < 0.05
    assert torch.equal(found.net.norm.running_var, whole.net.norm.running_var)
    for mine, other in zip(found.banks, whole.banks, strict=True):
        for name, table in other.named_tables().items():
            bound = table.abs().amax(1, keepdim=True) / 250
            assert bool(((mine.named_tables()[name] - table).abs() <= bound).all())
    again = save_model(tmp_path / "again", found, schema_transform, tables=tables, net=net)
    assert float((load_model(again).ranker(*rows) - found(*rows)).detach().abs().max()) < 1e-6


def _size_of_weights(folder):
    state = load_file(folder / "model.safetensors")
    return sum(value.numel() * value.element_size() for value in state.values())


def test_tables_stay_integers_in_memory_where_wanted(folder):
    rows, whole = TOY["rows"](20), load_model(folder).ranker
    small = load_model(folder, int8=True).ranker
    assert small.tables() == []
    assert 0 < float((small(*rows) - whole(*rows)).detach().abs().max()) < 0.05


def test_another_model_has_another_hash_and_replaces_the_old_one(folder, schema_transform):
    first = load_model(folder)
    other = ranker()
    with torch.no_grad():
        other.net.out.bias += 1
    save_model(folder, other, schema_transform, {"lr": 0.1, "seed": 3})
    assert load_model(folder).hash != first.hash
    assert sorted(path.name for path in folder.parent.iterdir()) == ["model"]


def test_a_failed_save_leaves_the_old_folder(folder, schema_transform, monkeypatch):
    before = load_model(folder).hash

    def fail(self, path):
        path.mkdir()
        raise OSError("disk full")

    monkeypatch.setattr(Transform, "save", fail)
    with pytest.raises(OSError, match="disk full"):
        save_model(folder, ranker(), schema_transform)
    assert load_model(folder).hash == before


@pytest.mark.fault("video V2")
def test_a_folder_that_is_replaced_while_it_is_read_is_refused(
    folder, schema_transform, monkeypatch
):
    other = ranker()
    with torch.no_grad():
        other.net.out.bias += 1
    read = Transform.load.__func__

    def read_and_replace(cls, path):
        found = read(cls, path)
        save_model(folder, other, schema_transform)
        return found

    with monkeypatch.context() as racing:
        racing.setattr(Transform, "load", classmethod(read_and_replace))
        with pytest.raises(GatesError, match="was replaced while it was read: load it again"):
            load_model(folder)
    rows = TOY["rows"](20)
    assert torch.equal(load_model(folder).ranker(*rows), other(*rows))


def break_off(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-5])


def flip(folder):
    path = folder / "transform" / "vocabulary.json"
    path.write_text(path.read_text().replace("60", "61"))


def edit(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


DAMAGES = {
    "absent": (shutil.rmtree, "is no model folder, it has no config.json"),
    "weights cut": (break_off, "model.safetensors is damaged, its digest is wrong"),
    "transform": (flip, "vocabulary.json is damaged, its digest is wrong"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "lacks model.safetensors"),
    "no transform": (lambda f: shutil.rmtree(f / "transform"), "lacks transform/vocabulary"),
    "foreign": (lambda f: edit(f, kind="bert"), "its config.json is of kind 'bert'"),
    "list": (lambda f: (f / "config.json").write_text("[]"), "of kind None"),
    "no JSON": (lambda f: (f / "config.json").write_text("{"), "config.json is damaged"),
    "newer": (lambda f: edit(f, format=2), "has format 2, this version reads 1"),
    "edited": (lambda f: edit(f, settings={"lr": 9}), "was changed after it was written"),
}


@pytest.mark.parametrize("case", DAMAGES)
def test_foreign_and_damaged_folders_are_refused_in_one_line(folder, case):
    damage, message = DAMAGES[case]
    damage(folder)
    with pytest.raises(GatesError, match=message) as caught:
        load_model(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c, w: c["net"].update(name="Other"), "there is no network 'Other'"),
        (lambda c, w: c["sizes"].update(video=61), "table 'video' has shape .60, 4., expected"),
        (lambda c, w: w.update(extra=torch.ones(1)), "weights that the network lacks, .* extra"),
        (
            lambda c, w: w.pop("net.out.bias"),
            'Error.* in loading state_dict.* Missing key.* "out.bias".*; write it again with',
        ),
        (
            lambda c, w: c["versions"].update(gatesuite="0.0.1") or w.pop("net.out.bias"),
            "out.bias.*; written by version 0.0.1, use that one or train again",
        ),
        (lambda c, w: w["net.out.bias"].fill_(torch.nan), "net.out.bias are not finite"),
        (lambda c, w: w["tables.0.user"].view(-1)[3:4].fill_(torch.inf), "are not finite, the"),
        (lambda c, w: w.pop("tables.1.user"), "tables.1.user"),
    ],
)
def test_what_does_not_fit_together_is_refused(folder, change, message):
    from harness.files import sha256, short_digest

    config, weights = json.loads((folder / "config.json").read_text()), folder / "model.safetensors"
    state = load_file(weights)
    change(config, state)
    save_file(state, weights)
    config["files"]["model.safetensors"] = sha256(weights)
    config["hash"] = short_digest({n: v for n, v in config.items() if n != "hash"}, 64)
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(GatesError, match=f"cannot be loaded: .*{message}") as caught:
        load_model(folder)
    assert "\n" not in str(caught.value)


def test_a_network_with_other_weights_is_not_saved(tmp_path):
    folded = ranker()
    folded.net.out.bias = None
    with pytest.raises(GatesError, match=r"see 'out.bias': save the ranker .* not folded\(\)"):
        save_model(tmp_path / "m", folded, Transform())
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_loaded_again_is_not_saved(tmp_path, schema_transform, refuses):
    own = TOY["toy_ranker"]()
    refuses(
        GatesError,
        (
            "with a ToyNet, cannot be built again",
            lambda: save_model(tmp_path / "m", own, Transform()),
        ),
        (
            r"no plain values of JSON: .*Path",
            lambda: save_model(tmp_path / "m", ranker(), schema_transform, {"path": tmp_path}),
        ),
        (
            "transform is of another schema",
            lambda: save_model(tmp_path / "m", ranker(), Transform()),
        ),
    )
    other = Transform(TOY["SIZES"] | {"video": 61})
    other.schema = schema_transform.schema
    with pytest.raises(GatesError, match="'video' has 60 rows in the ranker and 61 in the transf"):
        save_model(tmp_path / "m", ranker(), other)
    with pytest.raises(ValueError, match="tables is 'int4'"):
        save_model(tmp_path / "m", ranker(), schema_transform, tables="int4")
    assert list(tmp_path.iterdir()) == []
