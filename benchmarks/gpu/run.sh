#!/bin/sh
# On a host without a network: unpack a bundle of vLLM, run the stages, pack the results.
#   sh benchmarks/gpu/run.sh BUNDLE RESULTS.tar.gz [OPTION | STAGE ...]
# Files stay in $WORK, so that a second call on the same host unpacks nothing and goes on
# where the first ended.
set -eu
bundle=$1 results=$2
shift 2
work=${WORK:-/tmp/asl_gpu}
root=$(cd "$(dirname "$0")/../.." && pwd)
PYTHONPATH="$root:$root/kernels:$root/server:$root/testing${PYTHONPATH:+:$PYTHONPATH}" \
  exec "${PYTHON:-python3}" -m benchmarks.gpu --bundle "$bundle" --work "$work" \
  --output "$work/results" --pack "$results" "$@"
