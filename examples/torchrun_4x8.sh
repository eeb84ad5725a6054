#!/bin/bash
# Four nodes of eight GPUs without a scheduler: run this on each, HEAD being the name of the first:
#   HEAD=node0 examples/torchrun_4x8.sh sd35-large --teacher PATH --data CACHE --out /shared/sd35-large --data.batch 32
# dist.shard 8: each node holds one sharded copy, the nodes are replicas (HSDP). --out must be on a shared file system.
set -eu
exec torchrun --nnodes 4 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint "$HEAD:29400" --rdzv-id senseflow \
  -m senseflow.train "$@" --dist.shard 8
