#!/usr/bin/env bash
# Lends a node to a run that slurm/train_elastic.sh trains:
#
#     sbatch slurm/donor.sh data/runs/mine
#     sbatch --array=1-100%4 --partition=preemptible slurm/donor.sh data/runs/mine
#
# The folder is the run's, --train.out of the other job. It joins as soon as it runs, and leaves before its time
# limit, at a preemption, or after `scancel --signal=USR2 JOB`; the run goes on without it. An array like this
# has four donors at any time: the next comes when one has gone, and all end at once when the run is done.
#
# All that depends on the site is in one file, which HVDLM_SITE names: slurm/sites/README.md.

#SBATCH --job-name=hvdlm-donor
#SBATCH --output=%x-%j.log
# A start that follows a requeue adds to the log.
#SBATCH --open-mode=append
#SBATCH --time=04:00:00
#SBATCH --requeue

#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --hint=nomultithread
#SBATCH --exclusive
#SBATCH --mem=0

# To the agent, one to two minutes before the limit: a step and a good-bye take seconds.
#SBATCH --signal=USR2@120

set -euo pipefail

die() {
    echo "donor.sh: $1" >&2
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

[[ -z ${HVDLM_CONTAINER:-} ]] || die "the driver's job runs without a container: set HVDLM_ENV instead"
(($# == 1)) || die "needed: the run's folder, and nothing else; found $# words: $*"

# As many workers as the header has tasks, and one agent that starts them and may use all that they have.
unset SRUN_CPUS_PER_TASK SLURM_CPUS_PER_TASK
exec srun --mpi=none --nodes=1 --ntasks=1 --mem=0 --cpu-bind=none --gpu-bind=none --unbuffered \
    python -m hvdlm.elastic --join "$1"
