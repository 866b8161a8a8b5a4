"""The judge of images, and nearest drawings."""

import torch
from torch.testing import assert_close

from diffusion.evaluation.fusion_scores import (
    Judge,
    Judged,
    JudgedDataModule,
    pixel_errors,
    ranks_of,
)
from harness.runs.loops import ExactTrainer
from harness.runs.terminal import quiet_lightning


def test_styles_and_subjects_are_told_apart(tmp_path):
    """Colors are styles here, and places of a dark square subjects."""
    torch.manual_seed(0)
    count = 240
    styles, subjects = torch.randint(3, (count,)), torch.randint(2, (count,))
    images = torch.ones(count, 3, 32, 32)
    for row in range(count):
        top = 4 + 14 * int(subjects[row])
        images[row, int(styles[row]), top : top + 8, 10:20] = 0
    data = Judged((images * 255).to(torch.uint8), styles, subjects)
    quiet_lightning()
    judge = Judge(3, 2, width=8, steps=40)
    trainer = ExactTrainer(
        max_steps=40, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=tmp_path, accelerator="cpu",
    )  # fmt: skip
    trainer.fit(judge, JudgedDataModule(data, 32))
    style, subject = judge.eval().named(images)
    assert (style == styles).float().mean() > 0.95
    assert (subject == subjects).float().mean() > 0.95


def test_the_wanted_drawing_is_ranked_among_all():
    drawings = torch.eye(4).view(4, 1, 2, 2)
    images = torch.tensor([[0.9, 0.2, 0.0, 0.0], [0.0, 0.3, 0.2, 0.1]]).view(2, 1, 2, 2)
    assert ranks_of(images, drawings, torch.tensor([0, 3])).tolist() == [1, 3]
    assert ranks_of(images, drawings, torch.tensor([1, 1])).tolist() == [2, 1]


def test_equally_near_drawings_do_not_count_against_the_wanted_one():
    drawings = torch.zeros(3, 1, 2, 2)
    assert ranks_of(torch.ones(1, 1, 2, 2), drawings, torch.tensor([2])).tolist() == [1]


def test_pixel_errors_are_roots_of_mean_squares():
    images = torch.zeros(2, 3, 2, 2)
    drawings = torch.stack([torch.full((3, 2, 2), 0.5), torch.zeros(3, 2, 2)])
    assert_close(pixel_errors(images, drawings), torch.tensor([0.5, 0.0], dtype=torch.float64))
