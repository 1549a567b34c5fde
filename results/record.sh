#!/usr/bin/env bash
# Makes every record that results/ publishes for the machine it runs on, and goes on where it stopped when run again.
# Needs a GPU, the real image sets in $NETDYNO_DATA and an idle machine; about 20 minutes on a fast card.
set -euo pipefail
cd "$(dirname "$0")/.."
netdyno=${NETDYNO:-.venv/bin/netdyno}

$netdyno doctor --results results || true                          # the ceilings that records are held against
$netdyno run --suite full --results results --resume               # tuned and eager, to the targets
$netdyno run --suite full --tuning t4 --results results --resume   # the T4 policy on this card
# What cifar10-cnn and conv-autoencoder must reach: measured once, whatever became of the code since.
for workload in cifar10-cnn conv-autoencoder; do
  if [[ $(cat results/*/"$workload"/*.json | grep -c '"suite":"source"') -lt 5 ]]; then
    for seed in 0 1 2 3 4; do
      $netdyno run "$workload" --suite source --seed "$seed" --results results --resume
    done
  fi
done
