#!/bin/bash
#SBATCH --job-name=senseflow
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
# sbatch examples/slurm_1x8.sh sd35-large --teacher PATH --data CACHE --out /shared/sd35-large
# A task per GPU, without torchrun, so that Slurm's USR1 (300 s before the end) reaches every rank: the run saves, ends
# with status 75, and the job queues itself again and resumes.
set -u
out=runs/$1
for ((i = 1; i <= $#; i++)); do
  case ${!i} in --out) j=$((i + 1)) && out=${!j} ;; --out=*) out=${!i#--out=} ;; esac
done
export MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1) MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))
resume=$(compgen -G "$out/checkpoints/step-*" > /dev/null && echo --resume)
srun --kill-on-bad-exit=1 python -m senseflow.train "$@" $resume
status=$?
[ $status -eq 75 ] && scontrol requeue "$SLURM_JOB_ID"
exit $status
