#!/usr/bin/env bash
# Run a job: bash scripts/run.sh quantizer=kl granularity=channel
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/venv.sh"
use_venv ""
exec python -m qpipe "$@"
