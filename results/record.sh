#!/usr/bin/env bash
# Makes the records that results/ publishes, on the machine it runs on, and goes on where it stopped when run again.
# Needs a GPU, the real image sets in $NETDYNO_DATA and an idle machine; about an hour on a fast card.
set -euo pipefail
cd "$(dirname "$0")/.."
netdyno=${NETDYNO:-.venv/bin/netdyno}

$netdyno doctor --results results || true   # the ceilings that records are held against
$netdyno run --suite full --repeats 3 --results results --resume   # tuned and eager, to the targets
$netdyno run --suite full --tuning tuned --mode compute --repeats 3 --results results --resume   # what the loader costs
$netdyno run --suite full --tuning t4 --results results --resume   # the T4 policy on this card
# What cifar10-cnn and conv-autoencoder must reach: each seed once, on any machine, whatever became of the code since.
for workload in cifar10-cnn conv-autoencoder; do
  for seed in 0 1 2 3 4; do
    if ! cat results/*/"$workload"/*.json | grep '"suite":"source"' | grep '"status":"ok"' | grep -q "\"seed\":$seed,"; then
      $netdyno run "$workload" --suite source --seed "$seed" --results results
    fi
  done
done
