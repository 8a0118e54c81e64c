#!/usr/bin/env bash
# Trains on all GPUs of this machine, or of several. Paths mean what they mean where you are.
#
#   one machine        launch/torchrun.sh --base configs/model/cogvideox_5b.yaml configs/sft.yaml
#   several machines   NNODES=2 MASTER_ADDR=gpu03 launch/torchrun.sh --base ...       (the same on each)
#
# One process a GPU: those of CUDA_VISIBLE_DEVICES where it is set, else all; NPROC_PER_NODE says otherwise.
# torchrun alone forwards SIGTERM and kills what is left after 30 seconds, and SIGUSR1 would kill it and orphan the
# ranks. So it is told to forward both and to wait until a checkpoint has been written.
set -euo pipefail
here=$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")

if [ -n "${CUDA_VISIBLE_DEVICES+set}" ]; then
  gpus=0
  IFS=, read -ra names <<<"$CUDA_VISIBLE_DEVICES"
  for name in "${names[@]}"; do
    [ "$name" != -1 ] || break  # as CUDA reads it: what follows does not count
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
