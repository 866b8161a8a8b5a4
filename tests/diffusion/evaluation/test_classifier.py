import torch

from diffusion.evaluation.judge import Judge, Judged, JudgedDataModule
from harness.runs.quiet import quiet_lightning
from harness.runs.trainer import ExactTrainer


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
