#!/bin/bash
# SPDX-License-Identifier: Apache-2.0
# Trains on all hosts of a Cloud TPU slice at once.
#
#     export TPU=NAME ZONE=us-east5-a
#     launch/tpu_pod.sh install
#     launch/tpu_pod.sh train --config=mmdit_384p --workdir=/mnt/runs/a
#
# `install` builds a wheel of this checkout, copies it to every host, and installs it
# into ~/pyramid_jax there, with a Python of its own. Data and the folder of the run are
# on a disk that all hosts see at the same path. The command ends with this shell, so
# start it where that stays, e.g. in tmux. DRY_RUN=1 prints what would run.

set -euo pipefail

if (($# == 0)); then
  echo "usage: TPU=NAME ZONE=ZONE launch/tpu_pod.sh install|train [OPTIONS]" >&2
  exit 2
fi
: "${TPU:?give the name of the slice, as in TPU=NAME}"
: "${ZONE:?give its zone, as in ZONE=us-east5-a}"
cd "$(dirname "$0")/.."

run() {
  if [[ -n ${DRY_RUN:-} ]]; then
    printf '%q ' "$@"
    echo
  else
    "$@"
  fi
}

on_every_host() {
  run gcloud compute tpus tpu-vm ssh "$TPU" --zone="$ZONE" --worker=all --command="$1"
}

if [[ $1 == install ]]; then
  wheels=build/tpu_pod
  run rm -rf "$wheels"
  run python3 -m pip wheel . --no-deps --quiet --wheel-dir="$wheels"
  run gcloud compute tpus tpu-vm scp --recurse "$wheels" "$TPU:" --zone="$ZONE" \
    --worker=all
  # The images of TPU hosts have a Python that is too old.
  # shellcheck disable=SC2016  # the hosts expand it
  on_every_host 'set -e; uv=~/.local/bin/uv
python3 -m pip install --user --quiet uv
$uv venv --quiet --clear --python=3.12 ~/pyramid_jax
$uv pip install --quiet --python=$HOME/pyramid_jax "$(echo ~/tpu_pod/*.whl)[tpu]"
rm -r ~/tpu_pod'
else
  on_every_host "$(printf '%q ' pyramid_jax/bin/pyramid-jax "$@" --distributed)"
fi
