#!/bin/sh
# gates video fit on all GPUs of this machine, or on several machines.
#
#   apps/video/launch/torchrun.sh --config kuairand_27k --name first
#
# Several machines, on each of them (NODE_RANK 0, 1, ...):
#
#   NODES=2 NODE_RANK=0 HEAD=10.0.0.1 apps/video/launch/torchrun.sh --config kuairand_27k
#
# Every option of `gates video fit` may follow, such as --model.tables sharded, where no GPU could
# hold all tables, or --resume. GPUS=0 runs two processes on the CPU. data.batch_size is that of a
# step over all processes. With --data.source.init_args.workers 2 each process has two readers.
set -eu

NODES=${NODES:-1}
NODE_RANK=${NODE_RANK:-0}
HEAD=${HEAD:-127.0.0.1}
PORT=${PORT:-29500}
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
  -m apps.main video fit "$@" \
  --trainer.accelerator "$ACCELERATOR" --trainer.devices "$PROCESSES" \
  --trainer.num_nodes "$NODES" --trainer.strategy ddp
