#!/bin/bash
# SPDX-License-Identifier: Apache-2.0
# Trains on GPU nodes of a Slurm cluster, with one process on each.
#
#     sbatch --nodes=4 launch/slurm.sh train --config=mmdit_384p --workdir=runs/a
#
# Options of sbatch count more than those below, e.g. --gpus-per-node and --partition.
# All nodes need pyramid-jax on the path (sbatch hands on an active .venv), the data and
# the folder of the run. Ten minutes before its time is over Slurm interrupts the
# processes. They save a checkpoint with the next line of the log, which must be sooner
# than that, and the same command continues the run, as does a job that Slurm starts
# again. DRY_RUN=1 prints what would run.

#SBATCH --job-name=pyramid_jax
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@600
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log

set -euo pipefail

if (($# == 0)); then
  echo "usage: sbatch [OPTIONS] launch/slurm.sh train --config=NAME --workdir=FOLDER" >&2
  exit 2
fi

# When one process ends with an error, the others would wait for it for ever.
command=(srun --kill-on-bad-exit=1 --label pyramid-jax "$@" --distributed)
if [[ -n ${DRY_RUN:-} ]]; then
  printf '%q ' "${command[@]}"
  echo
else
  exec "${command[@]}"
fi
