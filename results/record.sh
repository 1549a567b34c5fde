#!/usr/bin/env bash
# Makes every record that results/ publishes for the machine it runs on, and goes on where it stopped when run again.
# Needs a GPU, the real image sets in $NETDYNO_DATA and an idle machine; about an hour on a fast card.
set -euo pipefail
cd "$(dirname "$0")/.."
netdyno=${NETDYNO:-.venv/bin/netdyno}

$netdyno run --suite full --results results --resume               # tuned and eager, to the targets
$netdyno run --suite full --tuning t4 --results results --resume   # the T4 policy on this card
# What cifar10-cnn and conv-autoencoder must reach. Only accuracies count here, so the five seeds run side by side; their
# records say so, and so does the table beside their speeds.
for seed in 0 1 2 3 4; do
  $netdyno run cifar10-cnn conv-autoencoder --suite source --seed $seed --results results --resume &
  seeds+=($!)
done
for seed in "${seeds[@]}"; do wait "$seed"; done
