"""The judge of images."""

import torch
from torch.testing import assert_close

from diffusion.data.scenes import SceneDataModule, scenes
from diffusion.evaluation.fusion_scores import Judge, Judged, pixel_errors
from harness.runs.loops import ExactTrainer
from harness.runs.terminal import quiet_lightning


def test_heads_name_what_images_show(tmp_path):
    """Colors are named by one head here, and places of a dark square by the other."""
    torch.manual_seed(0)
    count = 240
    labels = torch.stack([torch.randint(3, (count,)), torch.randint(2, (count,))], 1)
    images = torch.ones(count, 3, 32, 32)
    for row, (color, place) in enumerate(labels.tolist()):
        top = 4 + 14 * place
        images[row, color, top : top + 8, 10:20] = 0
    quiet_lightning()
    judge = Judge([3, 2], width=8, steps=40)
    trainer = ExactTrainer(
        max_steps=40, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=tmp_path, accelerator="cpu",
    )  # fmt: skip

    def make(rows, wordings, drawings):
        return Judged(images[rows], labels[rows])

    trainer.fit(judge, SceneDataModule(scenes("test")[:count], make, steps=40, batch_size=32))
    assert ((judge.eval().named(images) == labels).float().mean(0) > 0.95).all()


def test_pixel_errors_are_roots_of_mean_squares():
    images = torch.zeros(2, 3, 2, 2)
    drawings = torch.stack([torch.full((3, 2, 2), 0.5), torch.zeros(3, 2, 2)])
    assert_close(pixel_errors(images, drawings), torch.tensor([0.5, 0.0], dtype=torch.float64))
