# Sourced by run.sh and test.sh: `use_venv EXTRAS` makes .venv, again whenever what it is made from changes.

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv="$root/.venv"

use_venv() {
  local extras=$1 stamp made_from
  stamp="$venv/.made-from-${extras//,/-}"
  made_from=$(cat "$root/pyproject.toml" "$root/constraints.txt" | cksum)
  if [ ! -f "$stamp" ] || [ "$(cat "$stamp")" != "$made_from" ]; then
    make_venv "$extras" || { echo "the installation failed; see the lines above" >&2; return 1; }
    echo "$made_from" > "$stamp"
  fi
  export PATH="$venv/bin:$PATH"
}

make_venv() {
  local python=${PYTHON:-python3}
  "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
    { echo "$python is older than 3.11; set PYTHON to a newer one" >&2; return 1; }
  echo "installing into $venv (once)" >&2
  [ -x "$venv/bin/python" ] || "$python" -m venv "$venv" || return 1
  "$venv/bin/python" -m pip install --quiet -c "$root/constraints.txt" torch==2.13.0 &&
    "$venv/bin/python" -m pip install --quiet -c "$root/constraints.txt" -e "$root${1:+[$1]}"
}
