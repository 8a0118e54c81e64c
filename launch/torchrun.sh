#!/usr/bin/env bash
# Trains on all GPUs of this machine, or of several, so that a stop request reaches the run.
#
#   one machine        launch/torchrun.sh --base configs/model/cogvideox_5b.yaml configs/sft.yaml
#   several machines   NNODES=2 MASTER_ADDR=gpu03 launch/torchrun.sh --base ...       (the same on each)
#
# torchrun forwards SIGTERM and kills what is left after 30 seconds; SIGUSR1 would kill torchrun itself and orphan the
# ranks. So it is told to forward both and to wait until a checkpoint has been written.
set -euo pipefail
cd "$(dirname "$0")/.."

gpus=$(nvidia-smi --list-gpus 2>/dev/null | wc -l || true)
rendezvous=(--standalone)
if [ "${NNODES:-1}" -gt 1 ]; then
  rendezvous=(--rdzv-backend c10d --rdzv-endpoint "${MASTER_ADDR:?host of the first machine}:${MASTER_PORT:-29500}"
              --rdzv-id "${RUN_ID:-sat_train}")
fi

exec torchrun --nnodes "${NNODES:-1}" --nproc-per-node "${NPROC_PER_NODE:-$((gpus > 0 ? gpus : 1))}" "${rendezvous[@]}" \
  --signals-to-handle SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 --shutdown-timeout "${SHUTDOWN_TIMEOUT:-300}" \
  launch/train_video.py "$@"
