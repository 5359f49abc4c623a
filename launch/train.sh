#!/usr/bin/env bash
# Run training on the hosts of a hostfile, with DeepSpeed's launcher (which uses ssh and pdsh).
#   launch/train.sh HOSTFILE CONFIG [a.b=value ...]
# Run the same command again to resume from the newest checkpoint, with other hosts or fewer if some are broken: the
# global batch stays the same. MASTER_ADDR and MASTER_PORT default to the first
# host's name and 29500.
set -euo pipefail
if (($# < 2)); then
    echo "usage: $0 HOSTFILE CONFIG [a.b=value ...] (see $(dirname "$0")/hostfile.example)" >&2
    exit 2
fi
master=$(awk '!/^#/ && NF { print $1; exit }' "$1")
# Skip DeepSpeed's ssh check and its query of the master's address: the first host may not accept ssh from itself.
exec deepspeed --hostfile "$1" --no_ssh_check --master_addr "${MASTER_ADDR:-$master}" \
    --master_port "${MASTER_PORT:-29500}" --module megatron_dit train --elastic "${@:2}"
