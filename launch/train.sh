#!/usr/bin/env bash
# One training run over the hosts of a file, by DeepSpeed's launcher (ssh and pdsh between them).
#   launch/train.sh HOSTFILE CONFIG [a.b=value ...]
# Started again it goes on from the newest checkpoint. MASTER_ADDR, MASTER_PORT: the first host's (its name, 29500).
set -euo pipefail
if (($# < 2)); then
    echo "usage: $0 HOSTFILE CONFIG [a.b=value ...] (see $(dirname "$0")/hostfile.example)" >&2
    exit 2
fi
master=$(awk '!/^#/ && NF { print $1; exit }' "$1")
# Without check and address DeepSpeed would ask the first host by ssh, which it need not serve to itself.
exec deepspeed --hostfile "$1" --no_ssh_check --master_addr "${MASTER_ADDR:-$master}" \
    --master_port "${MASTER_PORT:-29500}" --module megatron_dit train "${@:2}"
