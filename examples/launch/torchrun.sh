#!/usr/bin/env bash
# Train on the GPUs of this node:
#   examples/launch/torchrun.sh examples/qwen2_7b/sft.yaml --model.path /models/Qwen2-7B --data.train sft.jsonl
# or on several nodes, each of which runs this with the same NNODES, MASTER_ADDR and MASTER_PORT:
#   NNODES=2 MASTER_ADDR=10.0.0.1 examples/launch/torchrun.sh CONFIG ...
# GPUS: ranks on this node (default: its GPUs). PYTHON: the interpreter (default: python).
set -euo pipefail

config=${1:?usage: torchrun.sh CONFIG [--section.key value ...]}
shift
gpus=${GPUS:-$(nvidia-smi --list-gpus | wc -l)}
nodes=${NNODES:-1}
if ((nodes > 1)); then
    # The ranks of all nodes rendezvous at the first node, which waits for late ones.
    meet=(--nnodes "$nodes" --rdzv-backend c10d --rdzv-id "${RUN_ID:-run}"
        --rdzv-endpoint "${MASTER_ADDR:?the first node of $nodes}:${MASTER_PORT:-29500}")
else
    meet=(--standalone)
fi

export OMP_NUM_THREADS=${OMP_NUM_THREADS:-8}
"${PYTHON:-python}" -m torch.distributed.run "${meet[@]}" --nproc-per-node "$gpus" \
    -m megatron_align.train --config "$config" "$@" &
agent=$!
# USR1 requests a checkpoint and is forwarded to the ranks: torchrun itself would die of it.
trap 'pkill -USR1 -P "$agent" || true' USR1
trap 'kill -TERM "$agent"' TERM INT

# A trapped signal ends a wait early.
while kill -0 "$agent" 2>/dev/null; do wait "$agent" || true; done
code=0
wait "$agent" || code=$?
exit "$code"
