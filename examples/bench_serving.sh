#!/usr/bin/env bash
# SGLang's own serving benchmark against a running server, without downloading anything.
#
#     examples/bench_serving.sh --base-url http://127.0.0.1:30000 --model-path out/model [more of its options]
#
# PYTHON names the interpreter that has SGLang (default: python3), e.g. PYTHON=.venv/bin/python.
#
# First prompts that share nothing, which shows what caching costs; then conversations of three turns, which
# shows what it gives. The other data sets of the benchmark ("random", "sharegpt", ...) need ShareGPT's file.
set -euo pipefail

base_url=http://127.0.0.1:30000
model_path=out/model
extra=()
python=${PYTHON:-python}
while (($#)); do
    case $1 in
        --base-url) base_url=$2; shift 2 ;;
        --model-path) model_path=$2; shift 2 ;;
        *) extra+=("$1"); shift ;;
    esac
done

# The model's directory is also the tokenizer's: nothing has to come from the network.
export HF_HUB_OFFLINE=1
results=$(mktemp)
trap 'rm -f "$results"' EXIT

serve() {
    "$python" -m sglang.benchmark.serving --base-url "$base_url" --model "$model_path" --tokenizer "$model_path" \
        --max-concurrency 4 --seed 1 --cache-report --output-file "$results" "$@" "${extra[@]}"
}

echo "== distinct prompts"
# Token ids instead of text: random ids would not survive decoding and encoding again.
serve --backend sglang --dataset-name random-ids --tokenize-prompt --random-input-len 256 --random-output-len 16 \
    --random-range-ratio 1.0 --num-prompts 16

echo "== conversations of three turns"
# Turns are sent as chat messages; the answers become part of the next prompt.
serve --backend sglang-oai-chat --dataset-name generated-shared-prefix --gsp-num-groups 4 --gsp-prompts-per-group 1 \
    --gsp-system-prompt-len 256 --gsp-question-len 32 --gsp-output-len 16 --gsp-num-turns 3 --num-prompts 4

# The benchmark itself ends well even if every request failed.
"$python" - "$results" <<'CHECK'
import json, sys

runs = [json.loads(line) for line in open(sys.argv[1])]
completed = [run["completed"] for run in runs]
print(f"runs={len(runs)} completed={completed} cached_tokens={[run['cache_report']['total_cached_tokens'] for run in runs]}")
sys.exit(not all(completed) or len(runs) != 2)
CHECK
