#!/bin/bash
# One node, eight GPUs, with torchrun: examples/torchrun_1x8.sh sd35-large --teacher PATH --data CACHE --out runs/sd35-large
# Student, fake and teacher are sharded over the eight (FSDP2). A crash or a preemption goes on from the last checkpoint.
set -u
out=runs/$1
for ((i = 1; i <= $#; i++)); do
  case ${!i} in --out) j=$((i + 1)) && out=${!j} ;; --out=*) out=${!i#--out=} ;; esac
done
for attempt in 1 2 3 4 5; do
  resume=$(compgen -G "$out/checkpoints/step-*" > /dev/null && echo --resume)
  torchrun --standalone --nproc-per-node 8 -m senseflow.train "$@" $resume && exit 0
  echo "attempt $attempt ended with status $?" >&2
done
exit 1
