#!/bin/sh
# gates video fit under Slurm: one task per GPU; a job that is ended or preempted continues exactly.
#
#   sbatch --nodes 2 apps/video/launch/slurm.sh --config kuairand_27k --name first
#
# Every option of `gates video fit` may follow, such as --model.tables sharded. The run folder must
# lie on a file system that all nodes share. Change the lines below to those of your cluster.
#SBATCH --job-name=gates-video
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --output=%x-%j.log
set -eu

export OMP_NUM_THREADS=1
export NCCL_ASYNC_ERROR_HANDLING=1

# A job that was requeued finds its run folder and resumes; the first start must not.
resume=""
[ "${SLURM_RESTART_COUNT:-0}" -gt 0 ] && resume="--resume"

exec srun --kill-on-bad-exit=1 python -m apps.main video fit "$@" $resume \
  --trainer.accelerator gpu --trainer.devices "$SLURM_NTASKS_PER_NODE" \
  --trainer.num_nodes "$SLURM_JOB_NUM_NODES" --trainer.strategy ddp
