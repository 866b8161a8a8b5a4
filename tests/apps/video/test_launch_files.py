"""The files that start ``gates video fit`` on many processes."""

from pathlib import Path

import pytest

import apps.video

FOLDER = Path(apps.video.__file__).parent / "launch"


@pytest.fixture
def files(launch_files):
    return launch_files(FOLDER)


@pytest.fixture
def words(files):
    return files.words


def value(words, option):
    return words[words.index(option) + 1]


def test_torchrun_starts_a_process_on_each_gpu(words):
    found = words("torchrun.sh", "--config", "kuairand_27k", "--name", "a")
    assert found[0].endswith("/torchrun")
    assert value(found, "--nproc_per_node") == value(found, "--trainer.devices") == "3"
    assert value(found, "--trainer.accelerator") == "gpu"
    assert value(found, "--nnodes") == value(found, "--trainer.num_nodes") == "1"
    place = found.index("apps.main")
    assert found[place - 1 : place + 7] == [
        "-m", "apps.main", "video", "fit", "--config", "kuairand_27k", "--name", "a",
    ]  # fmt: skip


def test_torchrun_spans_machines_and_runs_without_gpu(words):
    found = words("torchrun.sh", NODES="2", NODE_RANK="1", HEAD="10.0.0.7", GPUS="0")
    assert value(found, "--nnodes") == value(found, "--trainer.num_nodes") == "2"
    assert (value(found, "--node_rank"), value(found, "--master_addr")) == ("1", "10.0.0.7")
    assert value(found, "--trainer.accelerator") == "cpu"
    assert value(found, "--nproc_per_node") == value(found, "--trainer.devices") == "2"


@pytest.mark.parametrize(("restarts", "resumes"), [("", False), ("0", False), ("2", True)])
def test_a_slurm_job_that_was_requeued_resumes(words, restarts, resumes):
    job = {"SLURM_NTASKS_PER_NODE": "8", "SLURM_JOB_NUM_NODES": "4"}
    job |= {"SLURM_RESTART_COUNT": restarts} if restarts else {}
    found = words("slurm.sh", "--config", "kuairand_27k", **job)
    assert found[0].endswith("/srun")
    assert ("--resume" in found) == resumes
    assert (value(found, "--trainer.devices"), value(found, "--trainer.num_nodes")) == ("8", "4")


def test_slurm_asks_for_as_many_tasks_as_gpus(files):
    asked = files.asked()
    assert asked["ntasks-per-node"] == asked["gpus-per-node"]
    assert "signal" not in asked  # Lightning would requeue by itself, from its own checkpoint
