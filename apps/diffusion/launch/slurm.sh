#!/bin/sh
# gates diffusion train-gates under Slurm: one task per GPU; a job that is requeued continues.
#
#   sbatch --nodes 2 apps/diffusion/launch/slurm.sh --name first --base flux-dev
#
# Every option of `gates diffusion train-gates` may follow. The run folder must lie on a file system
# that all nodes share. STRATEGY=fsdp2 shards the frozen model. Change the lines below to those of
# your cluster.
#SBATCH --job-name=gates-diffusion
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --output=%x-%j.log
set -eu

export OMP_NUM_THREADS=1
export NCCL_ASYNC_ERROR_HANDLING=1

exec srun --kill-on-bad-exit=1 python -m apps.main diffusion train-gates "$@" \
  --accelerator gpu --devices "$SLURM_NTASKS_PER_NODE" --num_nodes "$SLURM_JOB_NUM_NODES" \
  --strategy "${STRATEGY:-ddp}"
