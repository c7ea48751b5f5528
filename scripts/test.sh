#!/usr/bin/env bash
# Check everything that CI checks; words go to pytest: bash scripts/test.sh -k registry
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/venv.sh"
use_venv test,zoo,llm
cd "$root"
ruff format --check .
ruff check .
mypy
lint-imports
python -m pytest "$@"
