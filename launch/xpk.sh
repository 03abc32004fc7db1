#!/bin/bash
# SPDX-License-Identifier: Apache-2.0
# Trains on TPU slices of a GKE cluster that xpk made (pip install xpk).
#
#     export CLUSTER=NAME TPU_TYPE=v5p-256 IMAGE=REGISTRY/pyramid_jax
#     launch/xpk.sh JOB train --config=mmdit_384p --workdir=/mnt/runs/a
#
# IMAGE has pyramid-jax on the path; docs/launchers.md makes one. SLICES is the number of
# slices (1). A job that is interrupted has GRACE seconds (600) to save a checkpoint, and
# is started again up to RESTARTS times (50), to continue. Data and the folder of the run
# are on storage of the cluster, which STORAGE names. Project and zone are those of
# gcloud. DRY_RUN=1 prints what would run.

set -euo pipefail

if (($# < 2)); then
  echo "usage: launch/xpk.sh JOB train --config=NAME --workdir=FOLDER" >&2
  exit 2
fi
: "${CLUSTER:?give the name of the cluster, as in CLUSTER=NAME}"
: "${TPU_TYPE:?give the type of its slices, as in TPU_TYPE=v5p-256}"
: "${IMAGE:?give a container image with pyramid-jax}"

job=$1
shift
command=(
  xpk workload create --workload="$job" --cluster="$CLUSTER"
  --tpu-type="$TPU_TYPE" --num-slices="${SLICES:-1}" --docker-image="$IMAGE"
  --max-restarts="${RESTARTS:-50}"
  --termination-grace-period-seconds="${GRACE:-600}"
  --command="$(printf '%q ' pyramid-jax "$@" --distributed)"
)
if [[ -n ${STORAGE:-} ]]; then
  command+=(--storage="$STORAGE")
fi
if [[ -n ${DRY_RUN:-} ]]; then
  printf '%q ' "${command[@]}"
  echo
else
  exec "${command[@]}"
fi
