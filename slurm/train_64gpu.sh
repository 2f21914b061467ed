#!/usr/bin/env bash
# Trains a run on 8 nodes of 8 GPUs, one process each:
#
#     sbatch slurm/train_64gpu.sh --config mine.toml --data.path data/mine --train.out data/runs/mine
#
# What follows the script's name goes to `python -m hvdlm.train`; what stands before it goes to Slurm, and
# wins over the lines below. `python -m hvdlm.slurm submit` checks first, and queues a chain of such jobs.
#
# Before its time limit, at a preemption, or after `scancel --signal=USR2 JOB` the run saves and the job ends
# with 75; its successor goes on from there. Where none is queued the job queues itself again, at most
# HVDLM_REQUEUES times (20 by default). Once the run is done, successors end within seconds.
#
# All that depends on the site is in one file, which HVDLM_SITE names: slurm/sites/README.md.

#SBATCH --job-name=hvdlm-train
#SBATCH --output=%x-%j.log
# A start that follows a requeue adds to the log.
#SBATCH --open-mode=append
#SBATCH --time=24:00:00
#SBATCH --requeue
# Of the jobs with this name one runs at a time. Two runs beside each other need two names: --job-name.
#SBATCH --dependency=singleton

#SBATCH --nodes=8
#SBATCH --ntasks-per-node=8
# A rank finds its own GPU among all of its node. --gpus-per-task would hide the others, and NCCL would copy
# through the host.
#SBATCH --gpus-per-node=8
# For a rank's own thread, Horovod's, two that read, one that saves.
#SBATCH --cpus-per-task=8
#SBATCH --hint=nomultithread
#SBATCH --exclusive
#SBATCH --mem=0

# To the ranks, ten to eleven minutes before the limit. With B: they would be told nothing.
#SBATCH --signal=USR2@600

set -euo pipefail

die() {
    echo "train_64gpu.sh: $1" >&2
    exit 2
}

# ---- the site: by name (slurm/sites/NAME.env where sbatch was called) or by path. Slurm runs a copy of this
# script from a folder of its own, so nothing can be found from where it lies.
site=${HVDLM_SITE:-generic}
[[ $site == */* ]] || site=$SLURM_SUBMIT_DIR/slurm/sites/$site.env
[[ -r $site ]] || die "no site file $site; call sbatch in the checkout, or set HVDLM_SITE to the file's path"
set -a # The ranks need what it sets.
# shellcheck source=sites/generic.env
. "$site"
set +a
umask "${HVDLM_UMASK:-027}"

# ---- the environment: modules, then the folder that install.sh made, or a container
if [[ -n ${HVDLM_MODULES:-} ]]; then
    set +u # Module systems read variables that are not set.
    type module &>/dev/null || . /etc/profile
    # shellcheck disable=SC2086 # Several names.
    module load $HVDLM_MODULES
    set -u
fi
if [[ -n ${HVDLM_ENV:-} ]]; then
    # shellcheck source=/dev/null
    . "$HVDLM_ENV/bin/activate"
fi
read -ra container <<<"${HVDLM_CONTAINER:-}"
"${container[@]}" python -c "import hvdlm" || die "python finds no hvdlm; set HVDLM_ENV or HVDLM_CONTAINER in $site"

export OMP_NUM_THREADS=${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}
export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1} # Slurm 22.05 to 23.02: srun does not take it from sbatch.
export PYTHONFAULTHANDLER=1                         # A rank that dies of a signal prints where it was.
export HDF5_USE_FILE_LOCKING=FALSE                  # Lustre and NFS often refuse locks; nothing here needs any.

# What Slurm knows of this job, once for all ranks: releases before 23.02 tell a job little of it, and a
# container has no scontrol.
HVDLM_JOB=$(SLURM_TIME_FORMAT=%s timeout 30 scontrol --oneliner show job "$SLURM_JOB_ID") || HVDLM_JOB=
export HVDLM_JOB
if [[ $HVDLM_JOB =~ \ EndTime=([0-9]+) ]]; then export SLURM_JOB_END_TIME=${BASH_REMATCH[1]}; fi

on_every_node() {
    srun --mpi=none --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 --kill-on-bad-exit=1 "$@"
}

if [[ -n ${HVDLM_TMPDIR:-} ]]; then
    export TMPDIR=$HVDLM_TMPDIR
    on_every_node mkdir -p "$TMPDIR"
fi

# ---- is there something to train? The answer is `train`, or the code that this job ends with; why it need not
# train is said on stderr. So what is still queued behind a finished run ends at once.
answer=$("${container[@]}" python -m hvdlm.slurm gate -- "$@")
[[ $answer == train ]] || exit "$answer"

mpi=${HVDLM_MPI:-pmix}
code=0
if [[ ${HVDLM_PREFLIGHT:-1} == 1 && -z ${HVDLM_CONTAINER:-} ]]; then # It starts steps, by srun.
    # shellcheck disable=SC2086 # Several words, or none.
    "${container[@]}" python -m hvdlm.slurm preflight --mpi "$mpi" --on-bad exclude \
        ${HVDLM_PREFLIGHT_OPTIONS:-} -- "$@" || code=$?
fi

# ---- the environment on the nodes' own disks: hundreds of processes that import from a shared file system at
# once keep it busy for minutes. HVDLM_ENV_TAR is made by: tar -C "$HVDLM_ENV" -cf hvdlm-env.tar .
shared_path=$PATH
if [[ -n ${HVDLM_ENV_TAR:-} ]]; then
    copy=${TMPDIR:-/tmp}/hvdlm-env-$SLURM_JOB_ID
    sbcast --force "$HVDLM_ENV_TAR" "$copy.tar"
    # shellcheck disable=SC2016 # For the other shell.
    on_every_node bash -c 'mkdir -p "$0" && tar -C "$0" -xf "$0.tar"' "$copy"
    PATH=$copy/bin:$PATH
fi

# ---- the ranks
if ((code)); then
    echo "train_64gpu.sh: the preflight ended with $code: no ranks are started" >&2
elif [[ $mpi == mpirun ]]; then
    # A preemption sends TERM to all processes of the nodes. Open MPI's daemons would kill the ranks a second
    # later, so they are made deaf to it (coreutils 8.31); the ranks hear it, save, and end the rest.
    deaf=
    env --block-signal=TERM true 2>/dev/null && deaf="env --block-signal=TERM"
    export OMPI_MCA_orte_launch_agent="$deaf orted"
    # shellcheck disable=SC2086 # Several words, or none.
    $deaf mpirun --map-by "ppr:$SLURM_NTASKS_PER_NODE:node" --bind-to none \
        "${container[@]}" python -m hvdlm.train "$@" || code=$?
else
    srun --mpi="$mpi" --label --unbuffered --kill-on-bad-exit=1 --wait=120 --cpu-bind=cores --gpu-bind=none \
        "${container[@]}" python -m hvdlm.train "$@" || code=$?
fi

if [[ -n ${copy:-} ]]; then
    PATH=$shared_path
    on_every_node rm -rf "$copy" "$copy.tar" || true
fi

# ---- how it ended: srun and mpirun give codes of their own where they ended ranks; exit.json has the true one.
# The answer is `again` where another start would go on from there.
launcher=$code code=0
answer=$("${container[@]}" python -m hvdlm.slurm conclude --launcher-code "$launcher" -- "$@") || code=$?
successors=$(timeout 30 squeue --noheader --name="$SLURM_JOB_NAME" --user="$(id -un)" --states=PENDING) || answer=
if [[ $answer == again && -z $successors ]]; then
    if ((${SLURM_RESTART_COUNT:-0} >= ${HVDLM_REQUEUES:-20})); then
        echo "train_64gpu.sh: not queued again after $SLURM_RESTART_COUNT requeues; sbatch it again" >&2
    else
        # Before it happens: it ends this script at once.
        echo "train_64gpu.sh: no successor is queued: queueing this job again" >&2
        scontrol requeue "$SLURM_JOB_ID" ||
            echo "train_64gpu.sh: this cluster does not requeue; sbatch it again, it goes on from there" >&2
    fi
fi
exit "$code"
