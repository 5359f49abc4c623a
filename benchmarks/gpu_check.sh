#!/usr/bin/env bash
# Check and measure on one GPU: the tests marked gpu, then training steps of four models in bf16 and FP8, with and
# without recompute, and three of them beside diffusers. Random weights and data; each run is a process of its own.
#
#   benchmarks/gpu_check.sh [tests|bench]
#
# Both parts by default. Needs the package's dependencies, pytest and transformer_engine; the models are sized for the
# 139 GiB of an H200. Writes benchmarks/results/gpu.json and gpu.md. Exit status: the tests'.
#   BUDGET   seconds after which no run is started any more (780: 15 minutes in all)
#   PYTHON   the interpreter (python3)
#   RESULTS  where the report goes (benchmarks/results)
#   RUNS     where each run's log and figures go (runs/gpu_check)
set -uo pipefail
cd "$(dirname "$0")/.." || exit 2
BUDGET=${BUDGET:-780} PYTHON=${PYTHON:-python3} RESULTS=${RESULTS:-benchmarks/results} RUNS=${RUNS:-runs/gpu_check}
TEST_SECONDS=300 RUN_SECONDS=120
part=${1:-all}
[[ $part =~ ^(all|tests|bench)$ ]] || { echo "error: part '$part': expected tests or bench" >&2; exit 2; }
export PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True
mkdir -p "$RUNS"

# MODEL -> its config and overrides. Parameters: mmdit-2b 2.02B; mmdit-18b 5.42B, of the 18B model's 19 blocks the 6
# that fit (24 bytes a parameter in the optimizer step: 121 GiB); dit-xl2 0.67B; pixart 0.61B.
config_of() {
    case $1 in
    mmdit-2b) echo configs/mmdit/18b.yaml model.heads=27 model.repa_block=0 model.repa_dim=0 \
        train.global_batch=128 train.micro_batch=32 ;;
    mmdit-18b) echo configs/mmdit/18b.yaml model.depth=6 model.repa_block=0 model.repa_dim=0 \
        train.global_batch=64 train.micro_batch=16 ;;
    dit-xl2) echo configs/dit/xl2-mup.yaml train.global_batch=64 train.micro_batch=64 ;;
    pixart) echo configs/pixart/target.yaml train.global_batch=64 train.micro_batch=64 ;;
    esac
}

# run MODEL PRECISION RECOMPUTE [--diffusers]: figures to NAME.json, or one line to NAME.error.
run() {
    local name=$1.$2.$3${4:+.${4#--}} overrides status
    overrides="parallel.tensor=1 parallel.sequence=false parallel.zero_stage=0 train.dtype=bf16 train.recompute=$3"
    case $2 in
    bf16) overrides+=" train.fp8=none parallel.backend=auto" ;;
    # A block that runs twice would count twice in the history of delayed scales.
    fp8) overrides+=" train.fp8=$([[ $3 == full ]] && echo current || echo delayed) parallel.backend=te" ;;
    esac
    rm -f "$RUNS/$name".*
    if ((SECONDS > BUDGET)); then
        echo "not run: $BUDGET s were over" >"$RUNS/$name.error"
        return
    fi
    echo "== $name, at $SECONDS s"
    # shellcheck disable=SC2046,SC2086  # words, on purpose
    timeout -k 10 "$RUN_SECONDS" "$PYTHON" -m megatron_dit bench $(config_of "$1") $overrides \
        --steps 10 --warmup 3 --json "$RUNS/$name.json" ${4:-} >"$RUNS/$name.log" 2>&1
    status=$?
    ((status == 0)) && return
    rm -f "$RUNS/$name.json"
    if ((status == 124)); then
        echo "not done in $RUN_SECONDS s" >"$RUNS/$name.error"
    else
        # The user's mistake is told in one line; of anything else the last line says most.
        (grep '^error: ' "$RUNS/$name.log" || tail -n 1 "$RUNS/$name.log") | head -n 1 >"$RUNS/$name.error"
        [[ -s $RUNS/$name.error ]] || echo "exit status $status" >"$RUNS/$name.error"
    fi
}

tests=0
if [[ $part != bench ]]; then
    rm -f "$RUNS/tests.xml"
    # The suite's own default is the CPU.
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
