"""The segmenter learns planted ellipses, and what it finds is marked as automatic."""

import warnings

import lightning as L
import numpy as np
import pytest
import torch
from torch import nn

from endoscopy.inputs.image_files import SourceFrame
from endoscopy.segmenter import AutomaticLocations, Segmenter, load_segmenter
from endoscopy.training.segmenter_module import (
    SegmenterModule,
    augmented,
    intersection_over_union,
    segmentation_loss,
    train_segmenter,
)


def planted(count, size=48, seed=0):
    """Ellipses brighter and redder than a wavy wall of random color."""
    generator = np.random.default_rng(seed)
    y, x = np.mgrid[0:size, 0:size] / size
    images, masks = [], []
    for _ in range(count):
        wave = np.sin(generator.uniform(3, 9, 2) @ [x.ravel(), y.ravel()]).reshape(size, size)
        wall = generator.uniform(60, 110, 3) * (1 + 0.2 * wave[..., None])
        center, radii = generator.uniform(0.3, 0.7, 2), generator.uniform(0.1, 0.25, 2)
        mask = ((x - center[0]) / radii[0]) ** 2 + ((y - center[1]) / radii[1]) ** 2 < 1
        image = wall + mask[..., None] * np.array([90, 40, 30])
        images.append((image + generator.normal(0, 4, image.shape)).clip(0, 255))
        masks.append(mask)
    pixels = torch.from_numpy(np.stack(images).astype(np.uint8)).permute(0, 3, 1, 2).contiguous()
    return pixels, torch.from_numpy(np.stack(masks))


@pytest.fixture(scope="module")
def trained():
    return train_segmenter(*planted(64), size=48, epochs=6, batch_size=16)


def test_it_finds_planted_ellipses(trained):
    images, masks = planted(32, seed=1)
    with torch.no_grad():
        found = trained(images / 255.0)[:, 0] > 0
    assert intersection_over_union(found, masks).mean() > 0.8
    untrained = Segmenter(48).eval()
    with torch.no_grad():
        found = untrained(images / 255.0)[:, 0] > 0
    assert intersection_over_union(found, masks).mean() < 0.4


def test_lightning_trains_it_too(tmp_path):
    images, masks = planted(16)
    data = torch.utils.data.TensorDataset(images, masks)
    module = SegmenterModule(Segmenter(48))
    before = nn.utils.parameters_to_vector(module.parameters()).clone()
    trainer = L.Trainer(
        accelerator="cpu", max_epochs=1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=tmp_path,
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of Lightning: workers, cores, its own deprecations
        trainer.fit(module, *[torch.utils.data.DataLoader(data, 8) for _ in range(2)])
    assert 0 <= trainer.callback_metrics["val/iou"] <= 1
    assert not torch.equal(before, nn.utils.parameters_to_vector(module.parameters()))


def test_exposure_does_not_matter(trained):
    images = planted(4, seed=2)[0] / 255.0
    with torch.no_grad():
        torch.testing.assert_close(trained(images), trained(images * 0.5), atol=0.3, rtol=0.05)


def test_saving_keeps_what_it_finds(trained, tmp_path):
    trained.save(tmp_path / "segmenter.safetensors")
    loaded = load_segmenter(tmp_path / "segmenter.safetensors")
    assert (tmp_path / "segmenter.safetensors").stat().st_size < 600_000
    images = planted(8, seed=3)[0] / 255.0
    with torch.no_grad():
        found, kept = trained(images) > 0, loaded(images) > 0
    assert (found == kept).float().mean() > 0.99


@pytest.mark.parametrize("content", [b"", b"rubbish" * 20])
def test_a_broken_file_is_refused_in_one_line(tmp_path, refused, content):
    (tmp_path / "a.safetensors").write_bytes(content)
    for name in ("a.safetensors", "absent.safetensors"):
        refused("holds no segmenter", load_segmenter, tmp_path / name)


def test_locations_fit_the_frame_whatever_its_size(trained):
    images, masks = planted(1, seed=4)
    large = images[0].permute(1, 2, 0).numpy().repeat(3, axis=0).repeat(2, axis=1)
    padded = np.pad(large, ((0, 10), (0, 20), (0, 0)))
    locations = AutomaticLocations(trained)
    found = [locations.locate(SourceFrame(pixels, "a", 0), trim=True) for pixels in (large, padded)]
    assert np.array_equal(found[0][0], found[1][0])
    assert found[0][1][0].box == found[1][1][0].box
    rows, columns = np.nonzero(masks[0].numpy())
    expected = (2 * columns.min(), 2 * columns.max() + 2, 3 * rows.min(), 3 * rows.max() + 3)
    assert np.abs(np.subtract(found[0][1][0].box, expected)).max() <= 8
    assert locations.origin == "automatic"


def test_a_frame_without_a_polyp_is_counted():
    segmenter = Segmenter(48)
    nn.init.zeros_(segmenter.head.weight)
    nn.init.constant_(segmenter.head.bias, -5.0)
    locations = AutomaticLocations(segmenter)
    frame = SourceFrame(np.full((40, 40, 3), 90, np.uint8), "a", 0)
    assert locations.locate(frame, trim=True).lesions == []
    assert locations.report.count("no polyp found") == 1


def test_the_loss_is_that_of_its_definition():
    logits, masks = torch.tensor([[[20.0, -20.0]]]), torch.tensor([[[1.0, 0.0]]])
    assert segmentation_loss(logits, masks) < 1e-6
    torch.testing.assert_close(segmentation_loss(-logits, masks), torch.tensor(20.0 + 1 - 1 / 3))


def test_augmentation_moves_image_and_mask_together():
    images = torch.zeros(64, 3, 12, 12)
    masks = torch.zeros(64, 12, 12)
    images[:, :, 2:5, 7:11] = 0.8
    masks[:, 2:5, 7:11] = 1
    torch.manual_seed(0)
    moved, labels = augmented(images, masks)
    assert labels.sum((1, 2)).eq(12).all()
    assert len({tuple(label.flatten().tolist()) for label in labels}) == 8
    inside = (moved.mean(1) * labels).sum((1, 2)) / 12
    assert (inside > (moved.mean(1) * (1 - labels)).sum((1, 2)) / 132 + 0.1).all()


def test_wrong_shapes_are_refused(refuses):
    refuses(
        ValueError,
        (
            r"must be \(N,3,S,S\)",
            lambda: train_segmenter(torch.zeros(2, 3, 8, 8), torch.zeros(3, 8, 8)),
        ),
        ("multiples of 8", lambda: Segmenter(50)),
    )
