#!/usr/bin/env bash
# Installs this code with the extra $1 (tpu, cuda) into .venv, unless that was done already.
set -euo pipefail

extra=${1:?usage: launch/install.sh EXTRA}
cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."
stamp=.venv/.ready-$extra
if [[ -f $stamp && ! setup.py -nt $stamp ]]; then exit 0; fi

for python in "${PYTHON:-python3.12}" python3.11 python3; do
  if "$python" -c 'import ensurepip, sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
    "$python" -m venv .venv
    .venv/bin/python -m pip install --quiet -e ".[all,$extra]"
    touch "$stamp"
    exit 0
  fi
done

# The images of TPU VMs have an older Python; uv brings its own.
if ! command -v uv >/dev/null; then
  curl -LsSf https://astral.sh/uv/install.sh | env UV_INSTALL_DIR="$HOME/.local/bin" sh
  PATH=$HOME/.local/bin:$PATH
fi
uv venv --quiet --allow-existing --python 3.12 .venv
uv pip install --quiet --python .venv/bin/python -e ".[all,$extra]"
touch "$stamp"
