#!/bin/sh
# A checkpoint against its stock model, with the same KV-cache memory for both:
# sh examples/benchmark.sh CHECKPOINT MODEL [OPTIONS of recalkv bench serve]
set -eu
checkpoint=${1:?expected CHECKPOINT MODEL} model=${2:?expected MODEL}
shift 2

# How many tokens fit; no weights are loaded. Blocks are of 128 tokens on a CPU.
recalkv plan "$checkpoint" --kv-cache-memory-bytes 160MiB --max-model-len 2048 --block-size 128

# Requests over HTTP that share texts, to a server of each in turn. More of them, and more rounds,
# make a figure to rely on: --prompts 4 --rounds 3. Results, a table and plots are in bench-serve.
recalkv bench serve "$checkpoint" --base "$model" --kv-cache-memory-bytes 160MiB \
    --workload documents --concurrency 4 --prompts 1 --rounds 1 -o bench-serve "$@"
