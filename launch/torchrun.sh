#!/usr/bin/env bash
# Trains on all GPUs of this machine, or of several. Paths are relative to the current folder.
#
#   one machine        launch/torchrun.sh --base configs/model/cogvideox_5b.yaml configs/sft.yaml
#   several machines   NNODES=2 MASTER_ADDR=gpu03 launch/torchrun.sh --base ...       (the same on each)
#
# One process per GPU: those of CUDA_VISIBLE_DEVICES if it is set, else all; NPROC_PER_NODE overrides both.
# By itself torchrun forwards SIGTERM, kills the ranks after 30 seconds, and is killed by SIGUSR1, which orphans them.
# Here it forwards both signals and waits until a checkpoint has been written.
set -euo pipefail
here=$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")

if [ -n "${CUDA_VISIBLE_DEVICES+set}" ]; then
  gpus=0
  IFS=, read -ra names <<<"$CUDA_VISIBLE_DEVICES"
  for name in "${names[@]}"; do
    [ "$name" != -1 ] || break  # CUDA ignores everything after a -1
    [ -z "${name// /}" ] || gpus=$((gpus + 1))
  done
else
  gpus=$(nvidia-smi --list-gpus 2>/dev/null | grep -c '^GPU' || true)
fi
rendezvous=(--standalone)
if [ "${NNODES:-1}" != 1 ]; then
  rendezvous=(--rdzv-backend c10d --rdzv-endpoint "${MASTER_ADDR:?host of the first machine}:${MASTER_PORT:-29500}"
              --rdzv-id "${RUN_ID:-sat_train}")
fi

exec python -m sat_train.cli.torchrun --nnodes "${NNODES:-1}" \
  --nproc-per-node "${NPROC_PER_NODE:-$((gpus > 0 ? gpus : 1))}" "${rendezvous[@]}" \
  --signals-to-handle SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 --shutdown-timeout "${SHUTDOWN_TIMEOUT:-300}" \
  "$here/train_video.py" "$@"
