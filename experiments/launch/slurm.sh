#!/usr/bin/env bash
# One training run on the GPU nodes of a Slurm cluster, one process a node, which has all of its cards. NOT RUN SO FAR.
#   sbatch --nodes=2 experiments/launch/slurm.sh --config=omni_3b:h100:8 [further flags of experiments/train.py]
#SBATCH --job-name=mer-r1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=32
#SBATCH --signal=TERM@600
#SBATCH --requeue
#SBATCH --output=mer-r1-%j.log
# Ten minutes before the time limit every process gets SIGTERM, saves and ends with 75; the job then queues again.
set -u
cd "${SLURM_SUBMIT_DIR:?start it with sbatch}" || exit 1

# The first node's process is the one the others look for. Slurm gives each process its own number.
coordinator=$(scontrol show hostnames "${SLURM_JOB_NODELIST:?}" | head -n 1)
export JAX_COORDINATOR_ADDRESS="$coordinator:${PORT:-12321}"
export JAX_NUM_PROCESSES=${SLURM_JOB_NUM_NODES:?}

srun --kill-on-bad-exit=0 bash -c 'JAX_PROCESS_ID=$SLURM_PROCID exec experiments/launch/worker.sh "$@"' worker "$@"
status=$?
[ "$status" = 75 ] && scontrol requeue "${SLURM_JOB_ID:?}"
exit "$status"
