#!/bin/bash
# Train on the nodes of a SLURM cluster, and go on after preemption or the end of the job's time:
#
#   sbatch --nodes 4 recipes/slurm.sh recipes/rw.py --config my.yaml --train.shard hybrid
#
# Options of sbatch override those below; start it where `python` is the one of your environment. SLURM sends SIGTERM to every rank
# when the job is preempted, and 300 seconds before its time is over (--signal). The ranks finish their step, write a checkpoint and end
# with code 143; the job then goes back into the queue, and continues from there. A run that fails is not started again.
#
# srun starts the ranks, not torchrun: torchrun kills its ranks 30 seconds after a SIGTERM, and a step may take longer.
#
#SBATCH --job-name=saro
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@300
#SBATCH --requeue
#SBATCH --open-mode=append

set -euo pipefail

if [ $# -eq 0 ]; then
    echo "error: no recipe is given; write sbatch recipes/slurm.sh recipes/rw.py and its options" >&2
    exit 2
fi

# Not "| head -n 1": it would end scontrol by SIGPIPE while it still writes, and the job with it.
nodes=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
MASTER_ADDR=${nodes%%$'\n'*}
# Jobs that share a node must not share a port.
MASTER_PORT=$((20000 + SLURM_JOB_ID % 10000))
export MASTER_ADDR MASTER_PORT

# Some clusters signal this script too. It must outlive the ranks. A handler is not inherited by them; an ignored signal would be.
trap : TERM

code=0
# --resume starts a new run if there is none. --kill-on-bad-exit=0: ranks that another one's failure ends say so themselves.
# shellcheck disable=SC2016
# srun takes no --cpus-per-task from sbatch since SLURM 22.05; without it each rank would have one CPU.
srun --kill-on-bad-exit=0 --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" bash -c '
    export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS
    export LOCAL_WORLD_SIZE=$((SLURM_NTASKS / SLURM_JOB_NUM_NODES))
    exec python "$@"
' rank "$@" --resume || code=$?

if [ "$code" -eq 143 ]; then
    echo "stopped by a signal, with a checkpoint: job $SLURM_JOB_ID goes back into the queue"
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
