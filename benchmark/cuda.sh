#!/usr/bin/env bash
# The tests that need a CUDA card, and the speed tables of one, to benchmark/results/cuda/. What matters most
# comes first, so that a card that is there for ten minutes has its tables; with --compile it takes longer.
set -uo pipefail
cd "$(dirname "$0")/.."
out=benchmark/results/cuda
mkdir -p "$out"

table() { # NAME OPTIONS
    python benchmark/update_time.py --device cuda "${@:2}" 2>&1 | tee "$out/$1.txt"
}

nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv > "$out/card.csv"
python -m pytest -n 0 tests/test_cuda.py tests/test_scripts.py -k "card and not compiled" 2>&1 |
    tee "$out/tests.txt"
for env in Hopper-v4 Humanoid-v4; do
    table "$env" --env-id "$env" --algorithms sac runs
    table "$env-graphs" --env-id "$env" --algorithms sac runs --cudagraphs
    table "$env-4096" --env-id "$env" --algorithms sac --batch-size 4096 --rounds 5
    table "$env-4096-graphs" --env-id "$env" --algorithms sac --batch-size 4096 --rounds 5 --cudagraphs
done
for env in Hopper-v4 Humanoid-v4; do
    table "$env-td3-ppo" --env-id "$env" --algorithms td3 ppo --rounds 6
    table "$env-td3-ppo-graphs" --env-id "$env" --algorithms td3 ppo --rounds 6 --cudagraphs
done
for env in Hopper-v4 Humanoid-v4; do
    table "$env-compiled" --env-id "$env" --compile --cudagraphs --algorithms sac runs
    table "$env-td3-ppo-compiled" --env-id "$env" --compile --cudagraphs --algorithms td3 ppo --rounds 6
done
python -m pytest -n 0 tests/test_cuda.py -k compiled 2>&1 | tee "$out/tests-compiled.txt"
