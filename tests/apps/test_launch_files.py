"""The files that start training on many processes."""

from importlib.resources import files
from types import SimpleNamespace

import pytest

APPS = {"diffusion": ("train-gates", "--"), "video": ("fit", "--trainer.")}
"""Application -> verb, and how options of its Trainer begin."""


@pytest.fixture(params=APPS)
def launch(request, launch_files):
    verb, prefix = APPS[request.param]
    made = launch_files(files(f"apps.{request.param}") / "launch")
    return SimpleNamespace(
        words=made.words, asked=made.asked, prefix=prefix, verb=[request.param, verb]
    )


def value(words, option):
    return words[words.index(option) + 1]


def test_torchrun_starts_a_process_on_each_gpu(launch):
    found = launch.words("torchrun.sh", "--config", "a", "--name", "b")
    assert found[0].endswith("/torchrun")
    assert value(found, "--nproc_per_node") == value(found, f"{launch.prefix}devices") == "3"
    assert value(found, "--nnodes") == value(found, f"{launch.prefix}num_nodes") == "1"
    assert value(found, f"{launch.prefix}accelerator") == "gpu"
    place = found.index("apps.main")
    words = ["-m", "apps.main", *launch.verb, "--config", "a", "--name", "b"]
    assert found[place - 1 : place + 7] == words


def test_torchrun_spans_machines_and_runs_without_gpu(launch):
    nodes = {"NODES": "2", "NODE_RANK": "1", "HEAD": "10.0.0.7"}
    found = launch.words("torchrun.sh", GPUS="0", STRATEGY="fsdp2", **nodes)
    assert value(found, "--nnodes") == value(found, f"{launch.prefix}num_nodes") == "2"
    assert (value(found, "--node_rank"), value(found, "--master_addr")) == ("1", "10.0.0.7")
    assert value(found, f"{launch.prefix}accelerator") == "cpu"
    assert value(found, "--nproc_per_node") == value(found, f"{launch.prefix}devices") == "2"
    if "diffusion" in launch.verb:
        assert value(found, "--strategy") == "fsdp2"
        assert value(launch.words("torchrun.sh"), "--strategy") == "ddp"


def test_slurm_starts_a_task_on_each_gpu_and_resumes_what_was_requeued(launch):
    job = {"SLURM_NTASKS_PER_NODE": "8", "SLURM_JOB_NUM_NODES": "4"}
    found = launch.words("slurm.sh", "--config", "a", **job)
    assert found[0].endswith("/srun")
    sizes = (value(found, f"{launch.prefix}{name}") for name in ("devices", "num_nodes"))
    assert (*sizes, "--resume" in found) == ("8", "4", False)
    asked = launch.asked()
    assert asked["ntasks-per-node"] == asked["gpus-per-node"]
    assert "signal" not in asked  # Lightning would requeue by itself, from its own checkpoint
    if "video" in launch.verb:
        for count in ("0", "2"):
            again = launch.words("slurm.sh", "--config", "a", **job, SLURM_RESTART_COUNT=count)
            assert ("--resume" in again) == (count == "2")
