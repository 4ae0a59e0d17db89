#!/usr/bin/env bash
# Every speed table on a CUDA card: eager, captured, compiled and captured; two tasks, two batch sizes; and the
# tests that need a card. About half an hour on one card; the tables go to benchmark/results/cuda/.
set -uo pipefail
cd "$(dirname "$0")/.."
out=benchmark/results/cuda
mkdir -p "$out"
nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv > "$out/card.csv"
python -m pytest -n 0 tests/test_cuda.py 2>&1 | tee "$out/tests.txt"
for env in Hopper-v4 Humanoid-v4; do
    for mode in "" "--cudagraphs" "--compile --cudagraphs"; do
        for batch in 256 4096; do
            name=$(echo "$env$mode-$batch" | tr -d ' ')
            python benchmark/update_time.py --env-id "$env" --device cuda --batch-size "$batch" $mode \
                2>&1 | tee "$out/$name.txt"
        done
    done
done
