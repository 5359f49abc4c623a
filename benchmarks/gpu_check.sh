#!/usr/bin/env bash
# Check one GPU in four parts, each of which ends within 10 minutes:
#
#   benchmarks/gpu_check.sh bench   training steps of four models in bf16: on the local backend, compiled, with full
#                                   recompute, and against diffusers
#   benchmarks/gpu_check.sh fp8     the same models on Transformer Engine, in bf16 and FP8
#   benchmarks/gpu_check.sh profile the ten most expensive kernels of a step, and the shares of matrix products, attention,
#                                   pointwise functions, communication and idle time
#   benchmarks/gpu_check.sh tests   the tests marked gpu
#
# Weights and data are random; each run has a process of its own. bench needs torch, deepspeed and megatron-core; runs
# that need another library are reported with the reason if it is missing. The largest model is sized by the GPU's memory.
# Every run updates benchmarks/results/gpu.json and gpu.md, so that an interrupted part leaves a report. The exit status
# is that of the tests.
#   BUDGET   seconds after which no further run of a part is started (default 480)
#   PYTHON   the Python interpreter (default python3)
#   RESULTS  folder of the report (default benchmarks/results)
#   RUNS     folder of each run's log and metrics (default runs/gpu_check)
set -uo pipefail
cd "$(dirname "$0")/.." || exit 2
BUDGET=${BUDGET:-480} PYTHON=${PYTHON:-python3} RESULTS=${RESULTS:-benchmarks/results} RUNS=${RUNS:-runs/gpu_check}
TEST_SECONDS=590 RUN_SECONDS=110
part=${1:-}
[[ $part =~ ^(bench|fp8|profile|tests)$ ]] ||
    { echo "error: part '$part': expected bench, fp8, profile or tests" >&2; exit 2; }
mkdir -p "$RUNS"

# MiB of the GPU's memory; 0 without a GPU.
memory=$(nvidia-smi --query-gpu=memory.total --format=csv,noheader,nounits --id=0 2>/dev/null) || memory=0

# Print the config and overrides of a model. Parameters: mmdit-2b 2.02B; mmdit-18b 5.42B, the 6 of the 18B model's 19
# blocks that fit 139 GiB at 22 bytes per parameter, or 2.98B, 3 blocks, with less; dit-xl2 0.67B; pixart 0.61B.
config_of() {
    case $1 in
    mmdit-2b) echo configs/mmdit/18b.yaml model.heads=27 model.repa_block=null model.repa_dim=null \
        train.global_batch=128 train.micro_batch=32 ;;
    mmdit-18b) echo configs/mmdit/18b.yaml model.depth=$((memory > 120000 ? 6 : 3)) model.repa_block=null model.repa_dim=null \
        train.global_batch=64 train.micro_batch=16 ;;
    dit-xl2) echo configs/dit/xl2-mup.yaml train.global_batch=64 train.micro_batch=64 ;;
    pixart) echo configs/pixart/target.yaml train.global_batch=64 train.micro_batch=64 ;;
    esac
}

# run MODEL PRECISION VARIANT: write metrics to NAME.json, or a one-line error to NAME.error. VARIANT is none (no
# recompute), full (recompute), compile, diffusers or profile.
run() {
    local name=$1.$2.$3 overrides status flags=()
    overrides="parallel.tensor=1 parallel.sequence=false parallel.zero_stage=0 train.dtype=bf16"
    overrides+=" train.recompute=$([[ $3 == full ]] && echo full || echo none)"
    [[ $3 == compile ]] && overrides+=" train.compile=true"
    [[ $3 == diffusers || $3 == profile ]] && flags=("--$3")
    case $2 in
    bf16) overrides+=" train.fp8=none parallel.backend=local" ;;
    te) overrides+=" train.fp8=none parallel.backend=te" ;;
    # With full recompute each block runs twice, which would enter it twice into the history of delayed scaling.
    fp8) overrides+=" train.fp8=$([[ $3 == full ]] && echo current || echo delayed) parallel.backend=te" ;;
    esac
    rm -f "$RUNS/$name".*
    if ((memory == 0)); then
        echo "not run: nvidia-smi found no GPU" >"$RUNS/$name.error"
        return
    fi
    if ((SECONDS > BUDGET)); then
        echo "not run: the budget of $BUDGET s was exceeded" >"$RUNS/$name.error"
        return
    fi
    echo "== $name, at $SECONDS s"
    # shellcheck disable=SC2046,SC2086  # word splitting is intended
    timeout -k 10 "$RUN_SECONDS" "$PYTHON" -m megatron_dit bench $(config_of "$1") $overrides \
        --steps 10 --warmup 3 --json "$RUNS/$name.json" "${flags[@]}" >"$RUNS/$name.log" 2>&1
    status=$?
    if ((status == 0)); then
        report >/dev/null
        return
    fi
    rm -f "$RUNS/$name.json"
    if ((status == 124)); then
        echo "timed out after $RUN_SECONDS s" >"$RUNS/$name.error"
    else
        # A user error is a line that starts with "error: "; for any other failure the last line is the most useful.
        (grep '^error: ' "$RUNS/$name.log" || tail -n 1 "$RUNS/$name.log") | head -n 1 >"$RUNS/$name.error"
        [[ -s $RUNS/$name.error ]] || echo "exit status $status" >"$RUNS/$name.error"
    fi
}

report() { "$PYTHON" benchmarks/gpu_report.py "$RUNS" "$RESULTS"; }

tests=0
case $part in
tests)
    rm -f "$RUNS/tests.xml"
    # The test suite uses the CPU by default.
    DS_ACCELERATOR=cuda timeout -k 10 "$TEST_SECONDS" "$PYTHON" -m pytest -m gpu -ra \
        --junitxml="$RUNS/tests.xml"
    tests=$?
    ;;
bench)
    for variant in none compile diffusers full; do
        for model in mmdit-18b mmdit-2b dit-xl2 pixart; do
            # The weights, gradients and states of two copies of the largest model do not fit.
            [[ $variant == diffusers && $model == mmdit-18b ]] || run $model bf16 $variant
        done
    done
    ;;
fp8)
    for variant in none full; do
        for model in mmdit-18b mmdit-2b dit-xl2 pixart; do
            run $model te $variant
            run $model fp8 $variant
        done
    done
    ;;
profile)
    for precision in bf16 te fp8; do
        for model in mmdit-18b dit-xl2 pixart; do
            run $model $precision profile
        done
    done
    ;;
esac
report || exit 1
exit "$tests"
