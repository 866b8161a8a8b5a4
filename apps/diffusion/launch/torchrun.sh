#!/bin/sh
# gates diffusion train-gates on all GPUs of this machine, or on several machines.
#
#   apps/diffusion/launch/torchrun.sh --name first --base flux-dev
#
# Several machines, on each of them (NODE_RANK 0, 1, ...):
#
#   NODES=2 NODE_RANK=0 HEAD=10.0.0.1 apps/diffusion/launch/torchrun.sh --name first
#
# Every option of `gates diffusion train-gates` may follow. STRATEGY=fsdp2 shards the frozen model,
# for one that does not fit on a GPU; gates are on all of them. GPUS=0 runs two processes on the
# CPU. --batch_size is that of a step over all processes, and a multiple of their number.
set -eu

NODES=${NODES:-1}
NODE_RANK=${NODE_RANK:-0}
HEAD=${HEAD:-127.0.0.1}
PORT=${PORT:-29500}
STRATEGY=${STRATEGY:-ddp}
GPUS=${GPUS:-$(nvidia-smi --list-gpus 2>/dev/null | wc -l)}
if [ "$GPUS" -eq 0 ]; then
  ACCELERATOR=cpu
  PROCESSES=${PROCESSES:-2}
else
  ACCELERATOR=gpu
  PROCESSES=${PROCESSES:-$GPUS}
fi

export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
exec torchrun --nnodes "$NODES" --node_rank "$NODE_RANK" --nproc_per_node "$PROCESSES" \
  --master_addr "$HEAD" --master_port "$PORT" \
  -m apps.main diffusion train-gates "$@" \
  --accelerator "$ACCELERATOR" --devices "$PROCESSES" --num_nodes "$NODES" --strategy "$STRATEGY"
