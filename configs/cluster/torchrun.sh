#!/bin/sh
# The same on every node: configs/cluster/torchrun.sh HOST:PORT NODES GPUS CONFIG [--KEY VALUE ...]
# HOST is one of the nodes, by the name or address that all of them know.
set -eu
usage="torchrun.sh HOST:PORT NODES GPUS CONFIG [--KEY VALUE ...]"
endpoint=${1:?$usage} nodes=${2:?$usage} gpus=${3:?$usage} config=${4:?$usage}
shift 4
PATH=$PWD/.venv/bin:$PATH

# Else ranks that are started again may read each other's old addresses (pytorch issue 135712).
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1

# A rank that dies or hangs ends all of them, on all nodes; torchrun starts them again, and they go on.
exec torchrun --nnodes "$nodes" --nproc-per-node "$gpus" --max-restarts "${MAX_RESTARTS:-3}" \
    --rdzv-backend c10d --rdzv-endpoint "$endpoint" --rdzv-id simclr \
    -m simclr_pl fit --config "$config" --resume auto \
    --trainer.num_nodes "$nodes" --trainer.devices "$gpus" "$@"
