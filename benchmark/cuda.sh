#!/usr/bin/env bash
# The tests that need a CUDA card, and the speed tables of one, to benchmark/results/cuda/. What
# matters most comes first, each part has its limit of time, and all of it eight minutes.
set -uo pipefail
cd "$(dirname "$0")/.."
out=benchmark/results/cuda
export PYTHONUNBUFFERED=1 # what meets its limit leaves the tables that it has
mkdir -p "$out"

part() { # NAME SECONDS COMMAND...
    local seconds=$((480 - SECONDS < $2 ? 480 - SECONDS : $2))
    if ((seconds < 5)); then
        echo "no time left for $1"
        return
    fi
    timeout "$seconds" "${@:3}" 2>&1 | tee "$out/$1.new"
    local status=${PIPESTATUS[0]}
    echo "$1: status $status, $SECONDS s since the start"
    if ((status == 0 || status == 124)); then # done, or out of time; otherwise the old table stays
        mv "$out/$1.new" "$out/$1.txt"
    fi
}
tests() { part "$1" "$2" "${PYTHON:-python}" -m pytest -q -n 0 "${@:3}"; }
table() { part "$1" "$2" "${PYTHON:-python}" benchmark/update_time.py --device cuda "${@:3}"; }

card=$(nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv) || exit
echo "$card" > "$out/card.csv"
tests tests 150 tests/test_cuda.py tests/test_scripts.py -k "card and not compiled"
sac=(--algorithms sac --rounds 8 --updates 20
    --methods memoryless S2PG "BPTT, L = 5, last" "BPTT, L = 32, last" "BPTT, L = 32, all")
for env in Hopper-v4 Humanoid-v4; do
    table "$env" 50 --env-id "$env" "${sac[@]}"
    table "$env-graphs" 50 --env-id "$env" "${sac[@]}" --cudagraphs
done
others=(--algorithms td3 ppo --rounds 4 --updates 20 --methods memoryless S2PG "BPTT, L = 32")
for env in Hopper-v4 Humanoid-v4; do
    table "$env-td3-ppo" 70 --env-id "$env" "${others[@]}"
    table "$env-td3-ppo-graphs" 50 --env-id "$env" "${others[@]}" --cudagraphs
done
table Hopper-v4-runs-graphs 90 --algorithms runs --methods S2PG --rounds 3 --cudagraphs
table Humanoid-v4-4096-graphs 40 --env-id Humanoid-v4 "${sac[@]}" --batch-size 4096 --cudagraphs
for env in Hopper-v4 Humanoid-v4; do
    table "$env-compiled" 90 --env-id "$env" --algorithms sac --rounds 8 --updates 20 \
        --methods memoryless S2PG --cudagraphs --compile
done
tests tests-compiled 90 tests/test_cuda.py -k "card and compiled"
