import torch

from harness.runs.loops import ResumableCSVLogger


def read(folder):
    return (folder / "metrics.csv").read_text()


def test_new_columns_extend_the_file(tmp_path):
    log = ResumableCSVLogger(tmp_path)
    log.log_metrics({"b": torch.tensor(1.5), "epoch": 0.0}, step=3)
    log.log_metrics({"a": 2.0}, step=4)
    assert read(tmp_path) == "a,b,epoch,step\n,1.5,0,3\n2.0,,,4\n"


def test_truncation_continues_where_the_checkpoint_was(tmp_path):
    whole = ResumableCSVLogger(tmp_path / "whole")
    for step in range(5):
        whole.log_metrics({"loss": step / 3, **({"late": 1.0} if step == 4 else {})}, step)
    broken = ResumableCSVLogger(tmp_path / "broken")
    for step in range(4):
        broken.log_metrics({"loss": step / 3, **({"other": 9.0} if step == 3 else {})}, step)
    with (tmp_path / "broken" / "metrics.csv").open("a") as file:
        file.write("0.3")  # partially written when killed
    again = ResumableCSVLogger(tmp_path / "broken")
    again.truncate(2)
    for step in range(2, 5):
        again.log_metrics({"loss": step / 3, **({"late": 1.0} if step == 4 else {})}, step)
    assert read(tmp_path / "broken") == read(tmp_path / "whole")


def test_a_run_without_checkpoint_starts_its_log_anew(tmp_path):
    ResumableCSVLogger(tmp_path).log_metrics({"loss": 1.0}, 0)
    ResumableCSVLogger(tmp_path).log_metrics({"loss": 2.0}, 0)
    assert read(tmp_path) == "loss,step\n2.0,0\n"
