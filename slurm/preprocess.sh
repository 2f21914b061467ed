#!/usr/bin/env bash
# Text to shards, by as many nodes as the job has:
#
#     sbatch slurm/preprocess.sh INPUT... --out DIR
#     sbatch --nodes=8 --time=2:00:00 slurm/preprocess.sh my_texts --out data/mine --dedup exact
#     sbatch --array=0-15 --nodes=1 slurm/preprocess.sh my_texts --out data/mine
#
# What follows the script's name goes to `python -m hvdlm.preprocess`; what stands before it, to Slurm, and
# wins over the lines below. Inputs and DIR have to be seen by all nodes. As an array, the elements make one
# data set together, each as soon as the queue lets it run.
#
# Shortly before the time limit the job is told to stop, keeps what is done, and queues itself again. So it
# does after `scancel --signal=USR2 JOB`, and at most HVDLM_REQUEUES times (20 by default). Bad input, a full
# disk, lack of memory or a plain `scancel JOB` end it for good; handed in again, it goes on from there.
#
# The environment is the one that sbatch was called from. Where a site does not pass it on, name the folder
# that install.sh made: HVDLM_ENV=$HOME/hvdlm-env.

#SBATCH --job-name=hvdlm-preprocess
#SBATCH --output=%x-%j.log
# A start that follows a requeue adds to the log.
#SBATCH --open-mode=append
#SBATCH --time=04:00:00
#SBATCH --requeue

# One process a node starts a worker for each of its cores; a worker takes up to 1 GiB.
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=8

# To the tasks, not to this script, two to three minutes before the limit.
#SBATCH --signal=USR2@180

set -uo pipefail

STOPPED=75  # The exit code that says: start me again.

if [[ -n ${HVDLM_ENV:-} ]]; then
    # shellcheck source=/dev/null
    . "$HVDLM_ENV/bin/activate" || exit 2
fi
if ! python -c "import hvdlm" 2>/dev/null; then
    echo "preprocess.sh: python finds no hvdlm; activate its environment before sbatch, or set HVDLM_ENV" >&2
    exit 2
fi

# No PMI: the processes meet in DIR, and MPI is not touched. srun does not take --cpus-per-task from sbatch.
# When a task is killed, for lack of memory say, the others take over what it had begun three minutes later.
srun --mpi=none --kill-on-bad-exit=0 --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" \
    python -m hvdlm.preprocess --workers "${SLURM_CPUS_PER_TASK:-1}" "$@"
code=$?

if ((code == STOPPED)); then
    if ((${SLURM_RESTART_COUNT:-0} >= ${HVDLM_REQUEUES:-20})); then
        echo "preprocess.sh: not queued again after ${SLURM_RESTART_COUNT:-0} requeues; sbatch it again" >&2
    else
        # Before it happens: it ends this script at once.
        echo "preprocess.sh: queueing this job again" >&2
        # One element of an array has the number of the whole array, so its own name is needed.
        scontrol requeue "${SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}${SLURM_ARRAY_TASK_ID:+_$SLURM_ARRAY_TASK_ID}" ||
            echo "preprocess.sh: this cluster does not requeue; sbatch it again, it goes on from there" >&2
    fi
fi
exit "$code"
