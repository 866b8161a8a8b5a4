"""What the segmenter is trained on, its command, and what the shipped one finds."""

from pathlib import Path

import numpy as np
import torch

import endoscopy
from apps.endoscopy.segmenter import main
from endoscopy.segmenter import FILE, SHIPPED, load_segmenter, shipped_segmenter
from endoscopy.training.segmenter_module import intersection_over_union, rendered_masks
from harness.experiment import Piece
from harness.files.piece import read_record

FOLDER = Path(endoscopy.__file__).parent.joinpath("weights", *SHIPPED)


def test_whole_frames_alternate_with_parts_that_show_most_of_the_polyp():
    images, masks = rendered_masks(6, 2, seed=5, size=64)
    assert (images.shape, images.dtype) == ((24, 3, 64, 64), torch.uint8)
    areas = masks.sum((1, 2)).float()
    assert (areas[1::2] / areas[0::2].clamp(min=1) > 1).float().mean() > 0.7
    corners = images[:, :, 0, 0].float().mean(1)
    assert (corners[0::2] < 10).all()  # outside the aperture
    assert (corners[1::2] > 10).any()
    again, _ = rendered_masks(6, 2, seed=5, size=64)
    assert torch.equal(images, again)


def test_the_command_trains_the_same_twice_and_tells_its_score(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("apps.endoscopy.segmenter.TEST_OBJECTS", 4)
    words = ["--objects", "2", "--frames", "1", "--epochs", "2", "--root"]
    trained = []
    for name in ("one", "two"):
        main([*words, str(tmp_path / name)])
        folder = Path(capsys.readouterr().out.splitlines()[-1])
        assert folder == tmp_path.joinpath(name, "endoscopy", "segmenter", *SHIPPED[1:])
        trained.append(load_segmenter(folder / FILE).state_dict())
    one, two = trained
    assert all(torch.equal(one[name], two[name]) for name in one)
    main([*words, str(tmp_path / "two")])
    out = capsys.readouterr().out
    assert "missing" not in out
    assert "intersection over union of new polyps: 0." in out


def test_the_shipped_segmenter_is_what_the_command_trains():
    piece = Piece("unet", 0, settings={"size": 96, "objects": 700, "frames": 3, "epochs": 12})
    assert read_record(FOLDER).fingerprint == piece.fingerprint
    assert piece.name == FOLDER.name


def test_the_shipped_segmenter_finds_rendered_polyps():
    assert (FOLDER / FILE).stat().st_size < 1_000_000
    segmenter = shipped_segmenter()
    images, masks = rendered_masks(20, 1, seed=99, size=segmenter.size)
    probability = np.stack([segmenter.probability(i.permute(1, 2, 0).numpy()) for i in images])
    found = torch.from_numpy(probability > 0.5)
    assert intersection_over_union(found, masks).mean() > 0.7
    assert intersection_over_union(found, masks.roll(20, dims=2)).mean() < 0.3
