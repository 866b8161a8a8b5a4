"""The files that start the training of gates on many processes."""

from pathlib import Path

import pytest

import apps.diffusion

FOLDER = Path(apps.diffusion.__file__).parent / "launch"


@pytest.fixture
def files(launch_files):
    return launch_files(FOLDER)


@pytest.fixture
def words(files):
    return files.words


def value(words, option):
    return words[words.index(option) + 1]


def test_torchrun_starts_a_process_on_each_gpu(words):
    found = words("torchrun.sh", "--name", "a")
    assert found[0].endswith("/torchrun")
    assert value(found, "--nproc_per_node") == value(found, "--devices") == "3"
    assert (value(found, "--accelerator"), value(found, "--strategy")) == ("gpu", "ddp")
    place = found.index("apps.main")
    assert found[place - 1 : place + 5] == [
        "-m", "apps.main", "diffusion", "train-gates", "--name", "a",
    ]  # fmt: skip


def test_torchrun_spans_machines_and_runs_without_gpu(words):
    found = words(
        "torchrun.sh", NODES="2", NODE_RANK="1", HEAD="10.0.0.7", GPUS="0", STRATEGY="fsdp2"
    )
    assert value(found, "--nnodes") == value(found, "--num_nodes") == "2"
    assert (value(found, "--node_rank"), value(found, "--master_addr")) == ("1", "10.0.0.7")
    assert value(found, "--accelerator") == "cpu"
    assert value(found, "--nproc_per_node") == value(found, "--devices") == "2"
    assert value(found, "--strategy") == "fsdp2"


def test_slurm_starts_a_task_on_each_gpu(words, files):
    job = {"SLURM_NTASKS_PER_NODE": "8", "SLURM_JOB_NUM_NODES": "4"}
    found = words("slurm.sh", "--name", "a", **job)
    assert found[0].endswith("/srun")
    assert (value(found, "--devices"), value(found, "--num_nodes")) == ("8", "4")
    asked = files.asked()
    assert asked["ntasks-per-node"] == asked["gpus-per-node"]
