#!/usr/bin/env bash
# Run the tests marked gpu on one GPU, then benchmark training steps of four models in bf16 and FP8, with and without
# recompute, and of three of them against diffusers. Weights and data are random; each run has a process of its own.
#
#   benchmarks/gpu_check.sh [tests|bench]
#
# Runs both parts by default. Requires the package's dependencies, pytest and transformer_engine; the models are sized
# for the 139 GiB of an H200. Writes benchmarks/results/gpu.json and gpu.md. The exit status is that of the tests.
#   BUDGET   seconds after which no further run is started (default 780, about 15 minutes in total)
#   PYTHON   the Python interpreter (default python3)
#   RESULTS  folder of the report (default benchmarks/results)
#   RUNS     folder of each run's log and metrics (default runs/gpu_check)
set -uo pipefail
cd "$(dirname "$0")/.." || exit 2
BUDGET=${BUDGET:-780} PYTHON=${PYTHON:-python3} RESULTS=${RESULTS:-benchmarks/results} RUNS=${RUNS:-runs/gpu_check}
TEST_SECONDS=300 RUN_SECONDS=120
part=${1:-all}
[[ $part =~ ^(all|tests|bench)$ ]] || { echo "error: part '$part': expected tests or bench" >&2; exit 2; }
export PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True
mkdir -p "$RUNS"

# Print the config and overrides of a model. Parameters: mmdit-2b 2.02B; mmdit-18b 5.42B, the 6 of the 18B model's 19
# blocks that fit (24 bytes per parameter in the optimizer step: 121 GiB); dit-xl2 0.67B; pixart 0.61B.
config_of() {
    case $1 in
    mmdit-2b) echo configs/mmdit/18b.yaml model.heads=27 model.repa_block=null model.repa_dim=null \
        train.global_batch=128 train.micro_batch=32 ;;
    mmdit-18b) echo configs/mmdit/18b.yaml model.depth=6 model.repa_block=null model.repa_dim=null \
        train.global_batch=64 train.micro_batch=16 ;;
    dit-xl2) echo configs/dit/xl2-mup.yaml train.global_batch=64 train.micro_batch=64 ;;
    pixart) echo configs/pixart/target.yaml train.global_batch=64 train.micro_batch=64 ;;
    esac
}

# run MODEL PRECISION RECOMPUTE [--diffusers]: write metrics to NAME.json, or a one-line error to NAME.error.
run() {
    local name=$1.$2.$3${4:+.${4#--}} overrides status
    overrides="parallel.tensor=1 parallel.sequence=false parallel.zero_stage=0 train.dtype=bf16 train.recompute=$3"
    case $2 in
    bf16) overrides+=" train.fp8=none parallel.backend=auto" ;;
    # With full recompute each block runs twice, which would enter it twice into the history of delayed scaling.
    fp8) overrides+=" train.fp8=$([[ $3 == full ]] && echo current || echo delayed) parallel.backend=te" ;;
    esac
    rm -f "$RUNS/$name".*
    if ((SECONDS > BUDGET)); then
        echo "not run: the budget of $BUDGET s was exceeded" >"$RUNS/$name.error"
        return
    fi
    echo "== $name, at $SECONDS s"
    # shellcheck disable=SC2046,SC2086  # word splitting is intended
    timeout -k 10 "$RUN_SECONDS" "$PYTHON" -m megatron_dit bench $(config_of "$1") $overrides \
        --steps 10 --warmup 3 --json "$RUNS/$name.json" ${4:-} >"$RUNS/$name.log" 2>&1
    status=$?
    ((status == 0)) && return
    rm -f "$RUNS/$name.json"
    if ((status == 124)); then
        echo "timed out after $RUN_SECONDS s" >"$RUNS/$name.error"
    else
        # A user error is a line that starts with "error: "; for any other failure the last line is the most useful.
        (grep '^error: ' "$RUNS/$name.log" || tail -n 1 "$RUNS/$name.log") | head -n 1 >"$RUNS/$name.error"
        [[ -s $RUNS/$name.error ]] || echo "exit status $status" >"$RUNS/$name.error"
    fi
}

tests=0
if [[ $part != bench ]]; then
    rm -f "$RUNS/tests.xml"
    # The test suite uses the CPU by default.
    DS_ACCELERATOR=cuda timeout -k 10 "$TEST_SECONDS" "$PYTHON" -m pytest -m gpu -ra \
        --junitxml="$RUNS/tests.xml"
    tests=$?
fi
if [[ $part != tests ]]; then
    for recompute in none full; do
        for model in mmdit-2b mmdit-18b dit-xl2 pixart; do
            for precision in bf16 fp8; do
                run $model $precision $recompute
            done
        done
    done
    for model in dit-xl2 pixart mmdit-2b; do
        run $model bf16 none --diffusers
    done
fi
"$PYTHON" benchmarks/gpu_report.py "$RUNS" "$RESULTS" || exit 1
exit "$tests"
