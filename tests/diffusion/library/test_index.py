"""What a scan reads, keeps, encodes and forgets."""

import os
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import diffusion.library.index
from diffusion.library import LibraryError, LoraLibrary
from diffusion.library.database import Matrix
from diffusion.library.paths import names_of


@pytest.fixture
def opened(monkeypatch):
    """Paths of the files that were read."""
    found = []
    read = diffusion.library.record.read_record

    def counting(place, *args):
        found.append(place.location.decode())
        return read(place, *args)

    monkeypatch.setattr(diffusion.library.index, "read_record", counting)
    return found


def counts(report):
    return report[:5]  # added, changed, unchanged, removed, encoded


def test_only_what_has_changed_is_read(library, root, put, opened, state):
    for seed, name in enumerate(("a", "styles/b", "styles/deep/c")):
        put(root / f"{name}.safetensors", seed)
    put(root / ".hidden/d.safetensors", 9)
    put(root / ".e.safetensors", 9)
    (root / "readme.txt").write_text("no adapter")
    calls = []
    report = library.scan(lambda done, total: calls.append((done, total)))
    assert (counts(report), report.kept) == ((3, 0, 0, 0, 3), 3)
    assert (calls[0], calls[-1]) == ((0, 3), (6, 6))
    assert [a.path for a in library.adapters()] == opened
    assert opened == ["a.safetensors", "styles/b.safetensors", "styles/deep/c.safetensors"]
    before = state(library)

    opened.clear()
    assert (counts(library.scan()), opened, state(library)) == ((0, 0, 3, 0, 0), [], before)

    put(root / "styles/b.safetensors", 7)
    (root / "a.safetensors").unlink()
    put(root / "z.safetensors", 8)
    assert counts(library.scan()) == (1, 1, 1, 1, 2)
    assert opened == ["styles/b.safetensors", "z.safetensors"]
    assert [a.name for a in library.adapters()] == ["b", "c", "z"]
    assert state(library) != before


def test_a_moved_file_is_not_encoded_again(library, root, put):
    put(root / "a.safetensors", 1)
    library.scan()
    (root / "b").mkdir()
    (root / "a.safetensors").rename(root / "b/c.safetensors")
    assert (counts(library.scan()), library.encoder.encoded) == ((1, 0, 0, 1, 0), 1)
    (match,) = library.search("anything")
    assert (match.name, match.path) == ("c", "b/c.safetensors")


def test_equal_content_is_encoded_once_and_found_once(library, root, put):
    put(root / "a.safetensors", 1)
    shutil.copy(root / "a.safetensors", root / "b.safetensors")
    tensors = load_file(root / "a.safetensors")
    save_file(tensors, root / "c.safetensors", {"modelspec.title": "another title"})
    renamed = {
        k.replace("lora_down", "lora_A").replace("lora_up", "lora_B"): t for k, t in tensors.items()
    }
    save_file(renamed, root / "d.safetensors")
    put(root / "e.safetensors", 2)
    report = library.scan()
    assert report.encoded == library.encoder.encoded == 2
    copies = ["b.safetensors", "c.safetensors", "d.safetensors"]
    assert report.duplicates == tuple((path, "a.safetensors") for path in copies)
    found = library.search("anything", 5)
    assert {m.path: m.duplicates for m in found} == {
        "a.safetensors": tuple(copies),
        "e.safetensors": (),
    }
    (root / "a.safetensors").unlink()
    assert library.scan().encoded == 0
    assert {m.path for m in library.search("anything", 5)} == {"b.safetensors", "e.safetensors"}


def test_settings_next_to_a_file_belong_to_it(library, root, put):
    plain = {"names": "diffusers_flux", "kind": "lora_A", "alpha": False, "layers": 1}
    for name in ("x", "y"):
        put(root / name / "adapter_model.safetensors", 1, **plain)
    library.scan()
    assert [a.name for a in library.adapters()] == ["x", "y"]
    one, two = library.adapters()
    assert one.digest == two.digest
    rank = one.ranks[0]
    text = f'{{"r": {rank}, "lora_alpha": {3 * rank}, "rank_pattern": {{}}, "alpha_pattern": {{}}}}'
    (root / "y/adapter_config.json").write_text(text)
    assert counts(library.scan()) == (0, 1, 1, 0, 1)
    one, two = library.adapters()
    assert two.norm == pytest.approx(3 * one.norm)


def test_another_encoder_encodes_again(library, root, put, encoders, state):
    for seed in range(4):
        put(root / f"{seed}.safetensors", seed)
    library.scan()
    first = Matrix(library.index, library.encoder.fingerprint, encoders.DIM)
    assert len(first) == 4
    with LoraLibrary(root, encoders.Probes("2", 24), encoders.Words(24), least=-1) as other:
        assert "no embedding of this encoder" in other.search("anything").notice
        assert (counts(other.scan()), len(other.search("anything"))) == ((0, 0, 4, 0, 4), 3)
        assert {a for a in state(other) if a.startswith("probes")} == {"probes 2 24"}
    assert not first.path.exists()
    assert (library.search("anything").mode, library.scan().encoded) == ("metadata", 4)


def test_two_encoders_of_different_families_live_together(library, root, put, encoders):
    put(root / "flux.safetensors", 1)
    put(root / "sd3.safetensors", 1, names="native_sd3", prefix="lora_unet_")
    library.scan()
    probes = encoders.Probes("sd3")
    probes.family = "sd3"
    with LoraLibrary(root, probes, encoders.Words(), least=-1) as other:
        assert (other.scan().encoded, [m.name for m in other.search("anything")]) == (1, ["sd3"])
    assert [m.name for m in library.search("anything")] == ["flux"]


def test_files_that_are_found_by_metadata_alone_have_a_reason(library, root, put, put_sdxl):
    put(root / "good.safetensors", 1)
    put(root / "sd3.safetensors", 1, names="native_sd3", prefix="lora_unet_")
    put_sdxl(root / "sdxl.safetensors")
    for name, value in (("nan", float("nan")), ("zero", 0.0)):
        tensors = load_file(put(root / f"{name}.safetensors", 2))
        key = next(k for k in tensors if k.endswith("lora_up.weight"))
        if name == "zero":
            tensors = {k: t * 0 if "lora_up" in k else t for k, t in tensors.items()}
        else:
            tensors[key][0, 0] = value
        save_file(tensors, root / f"{name}.safetensors")
    extra = load_file(put(root / "extra.safetensors", 3)) | {"strange.weight": torch.ones(2)}
    save_file(extra, root / "extra.safetensors")
    report = library.scan()
    reasons = dict(report.unencoded)
    assert report.encoded == 1
    assert set(reasons) == {f"{n}.safetensors" for n in ("sd3", "sdxl", "nan", "zero", "extra")}
    assert reasons["sd3.safetensors"] == "it is for sd3, the encoder serves flux"
    assert reasons["sdxl.safetensors"] == "it is for sdxl, the encoder serves flux"
    assert reasons["nan.safetensors"].startswith("it holds NaN, infinity or a change")
    assert reasons["zero.safetensors"].startswith("the change of every layer is zero")
    assert "1 of 10 tensors cannot be used" in reasons["extra.safetensors"]
    assert [m.name for m in library.search("anything", 9)] == ["good"]
    with LoraLibrary(
        root, library.encoder, library.text_encoder, lenient=True, least=-1
    ) as lenient:
        assert lenient.scan().encoded == 1
        assert {m.name for m in lenient.search("anything", 9)} == {"good", "extra"}
    flags = {a.name: a.flags for a in library.adapters()}
    assert (flags["nan"], flags["zero"]) == (("nonfinite",), ("zero",))
    assert flags["extra"] == ("unmapped",)
    assert flags["good"] == flags["sdxl"] == ()


def test_a_refusal_of_the_encoder_is_kept(library, root, put):
    put(root / "a.safetensors", 1)
    library.encoder.refusal = lambda bundle: "it is too\nwide"
    assert library.scan().unencoded == (("a.safetensors", "it is too wide"),)
    library.encoder.refusal = lambda bundle: pytest.fail("asked again")
    assert (library.scan().encoded, library.search("anything").mode) == (0, "metadata")


@pytest.mark.parametrize("vector", [torch.ones(3), torch.zeros(16), torch.full((16,), torch.nan)])
def test_an_encoder_that_gives_no_vector_is_refused(vector, library, root, put, one_line):
    put(root / "a.safetensors", 1)
    library.encoder.encode = lambda bundle: vector
    assert "expected (16,)" in one_line(LibraryError, library.scan)


def test_broken_files_are_kept_with_their_reason_and_not_opened_again(library, root, put, opened):
    put(root / "good.safetensors", 1)
    (root / "broken.safetensors").write_bytes(b"\xff" * 100)
    (root / "empty.safetensors").write_bytes(b"")
    report = library.scan()
    assert counts(report) == (1, 0, 0, 0, 1)
    reasons = dict(report.refused)
    assert set(reasons) == {"broken.safetensors", "empty.safetensors"}
    assert all(r.isprintable() and str(root) not in r for r in reasons.values())
    opened.clear()
    again = library.scan()
    assert (counts(again), again.refused, opened) == ((0, 0, 1, 0, 0), report.refused, [])
    (root / "broken.safetensors").chmod(0o600)  # permissions may have been the reason
    library.scan()
    assert opened == ["broken.safetensors"]
    put(root / "broken.safetensors", 3)
    assert counts(library.scan()) == (0, 1, 1, 0, 1)
    assert [m.name for m in library.search("anything", 9)].count("broken") == 1


def test_a_row_that_is_lost_is_made_again(library, root, put):
    for seed in range(3):
        put(root / f"{seed}.safetensors", seed)
    library.scan()
    matrix = Matrix(library.index, library.encoder.fingerprint, library.encoder.dim)
    os.truncate(matrix.path, 4 * library.encoder.dim + 7)
    assert ([m.name for m in library.search("anything", 9)], library.scan().encoded) == (["0"], 2)
    assert len(library.search("anything", 9)) == 3


def test_rows_of_removed_files_are_used_again(library, root, put):
    for seed in range(4):
        put(root / f"{seed}.safetensors", seed)
    library.scan()
    for seed in (1, 2):
        (root / f"{seed}.safetensors").unlink()
    library.scan()
    for seed in range(5, 8):
        put(root / f"{seed}.safetensors", seed)
    library.scan()
    assert len(library.search("anything", 9)) == 5
    assert len(Matrix(library.index, library.encoder.fingerprint, library.encoder.dim)) == 5


def test_add_and_remove(library, root, put, one_line, tmp_path):
    put(root / "a/x.safetensors", 1)
    adapter = library.add(root / "a/x.safetensors")
    assert (adapter.name, adapter.path, adapter.flags) == ("x", "a/x.safetensors", ())
    assert library.add("a/x.safetensors") == adapter
    assert [m.name for m in library.search("anything")] == ["x"]
    assert library.find("a/x.safetensors") == library.find("x") == adapter
    assert library.load("x").family == "flux"
    library.remove("x")
    assert library.adapters() == []
    assert "no adapter 'x'" in one_line(LibraryError, library.remove, "x")
    library.add("a/x.safetensors")
    assert "did you mean x" in one_line(LibraryError, library.find, "xx")
    assert "outside" in one_line(LibraryError, library.add, put(tmp_path / "y.safetensors", 2))
    assert "cannot be read" in one_line(LibraryError, library.add, root / "none.safetensors")
    (root / "b.safetensors").write_bytes(b"no")
    assert "too few" in one_line(LibraryError, library.add, "b.safetensors")
    assert "end with" in one_line(LibraryError, library.add, root / "a.ckpt")


def test_libraries_and_indexes_that_cannot_be_used(root, put, one_line, tmp_path):
    assert "missing" in one_line(LibraryError, LoraLibrary(tmp_path / "none").scan)
    assert not (tmp_path / "none").exists()
    file = put(tmp_path / "file.safetensors", 1)
    assert "a file" in one_line(LibraryError, LoraLibrary(file).scan)
    assert "no index" in one_line(LibraryError, LoraLibrary(root).search, "a dog")
    assert "no index" in one_line(LibraryError, LoraLibrary(root).adapters)
    assert list(root.iterdir()) == []
    assert "cannot be used" in one_line(LibraryError, LoraLibrary(root, index=file / "x").scan)
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    (damaged / "index.sqlite").write_bytes(b"no database" * 999)
    assert "damaged" in one_line(LibraryError, LoraLibrary(root, index=damaged).scan)
    with LoraLibrary(root, index=tmp_path / "later") as later:
        later.scan()
        database = later._catalog().database
        with database.writing():
            database.run("PRAGMA user_version = 99")
    assert "version 99" in one_line(LibraryError, LoraLibrary(root, index=later.index).scan)


def test_an_index_elsewhere_leaves_the_library_as_it_is(root, put, encoders, tmp_path):
    put(root / "a.safetensors", 1)
    with LoraLibrary(root, encoders.Probes(), index=tmp_path / "index") as library:
        library.scan()
    assert [path.name for path in root.iterdir()] == ["a.safetensors"]


NAMES = {
    "水彩.safetensors": "水彩", "стиль №1.safetensors": "стиль-№1", "हिन्दी.safetensors": "हिन्दी",
    "e\u0301te\u0301.safetensors": "été", "🔥 fire.safetensors": "🔥-fire",
    "a/tint.safetensors": "a-tint", "b/tint.safetensors": "b-tint",
    "c/d/look.safetensors": "d-look", "c/e/look.safetensors": "e-look",
    "x/f/mood.safetensors": "x-f-mood", "y/f/mood.safetensors": "y-f-mood",
    "top.safetensors": "top", "g/top.safetensors": "g-top", "only/one.safetensors": "one",
    "p/adapter_model.safetensors": "p",
}  # fmt: skip


@pytest.mark.fault("46 D2")
@pytest.mark.parametrize("order", [1, -1])
def test_names_keep_their_script_and_do_not_depend_on_the_order(root, put, order, one_line):
    with LoraLibrary(root) as library:
        for seed, path in enumerate(list(NAMES)[::order]):
            put(root / path, seed)
            library.add(root / path)
        found = {os.fsdecode(one.location): one.name for one in library.adapters()}
        assert (found, library.find("e\u0301te\u0301").name) == (NAMES, "été")
        assert [one.name for one in library.search("水彩")] == ["水彩"]
        assert "did you mean " in one_line(LibraryError, library.find, "tint")
        (root / "b/tint.safetensors").unlink()
        library.scan()
        assert library.find("tint").location == b"a/tint.safetensors"
        assert [one.name for one in library.search("tint")] == ["tint"]


@pytest.mark.fault("46 D2")
def test_names_that_no_folder_distinguishes_end_with_a_hash():
    places = [b"a b.safetensors", b"a-b.safetensors", b"q/w.safetensors", b"e/w.safetensors",
              b"q-w.safetensors"]  # fmt: skip
    found = names_of(places)
    assert (found, len(set(found.values()))) == (names_of(places[::-1]), len(places))
    assert all(found[one].startswith("a-b-") for one in places[:2])
    assert (found[b"q-w.safetensors"], found[b"e/w.safetensors"]) == ("q-w", "e-w")
