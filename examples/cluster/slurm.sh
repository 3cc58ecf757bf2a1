#!/bin/bash
#SBATCH --job-name=nemo-like
#SBATCH --nodes=2
#SBATCH --gpus-per-node=8
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --time=04:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#
# One run on the machines of a Slurm job. In the repository, which all machines see at the same path:
#
#   sbatch --nodes=16 examples/cluster/slurm.sh examples/run_grpo.py --config recipes/llm/... key=value ...
#
# The run saves and ends a quarter of an hour before the job's time is over, and the job is queued
# again: it goes on where it was.
set -euo pipefail

mapfile -t machines < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
address="${machines[0]}:6379"
left=$((SLURM_JOB_END_TIME - $(date +%s) - 900))
if ((left <= 0)); then
    echo "the job's time is over in less than 15 minutes: ask for more by sbatch --time" >&2
    exit 2
fi
must_save_by="$(printf '%02d:%02d:%02d:%02d' $((left / 86400)) $((left / 3600 % 24)) $((left / 60 % 60)) $((left % 60)))"

uv sync --extra vllm # here, and not on all machines at the same time
# Who does not know this secret can not reach the run's Ray. The machines find it in the home folder.
export RAY_AUTH_MODE=token
uv run --no-sync ray get-auth-token --generate >/dev/null

status=0
# Ray on every machine, the run on the first, and an end of all when the run ends.
srun uv run --no-sync ray symmetric-run --address "$address" --min-nodes "$SLURM_NNODES" -- \
    python "$1" \
    cluster.address="$address" \
    cluster.num_nodes="$SLURM_NNODES" \
    cluster.gpus_per_node="$SLURM_GPUS_ON_NODE" \
    checkpointing.checkpoint_must_save_by="$must_save_by" \
    "${@:2}" || status=$?

if ((status == 75)); then # saved, and not at its end
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
