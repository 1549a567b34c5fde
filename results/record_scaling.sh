#!/usr/bin/env bash
# Makes records of several GPUs: each network on two, four, eight and so on of those that are visible (0,1 unless
# CUDA_VISIBLE_DEVICES says otherwise), beside runs of one, one on each of them at a time. Arguments: the networks, else
# all six. Needs GPUs that are alike, the real image sets in $NETDYNO_DATA and an idle machine; three quarters of an hour
# on two fast cards. Goes on where it stopped when run again.
set -euo pipefail
cd "$(dirname "$0")/.."
netdyno=${NETDYNO:-.venv/bin/netdyno}
export CUDA_VISIBLE_DEVICES=${CUDA_VISIBLE_DEVICES:-0,1}
gpus=$(tr ',' '\n' <<<"$CUDA_VISIBLE_DEVICES" | wc -l)
[ "$gpus" -gt 1 ] || { echo "record_scaling.sh: CUDA_VISIBLE_DEVICES names one GPU, where it takes two or more" >&2; exit 1; }
[ $# -gt 0 ] || set -- mnist-cnn cifar10-cnn cifar100-cnn conv-autoencoder dcgan resnet50-transfer

$netdyno doctor --results results || true   # the ceilings that records are held against
for workload in "$@"; do
  for mode in e2e compute; do   # compute: nothing pauses for an evaluation
    common=("$workload" --suite full --tuning tuned --mode "$mode" --results results --resume)
    $netdyno run "${common[@]}" --parallel --repeats "$gpus"
    for ((n = 2; n <= gpus; n *= 2)); do
      $netdyno run "${common[@]}" --gpus "$n" --repeats 3
    done
  done
done
