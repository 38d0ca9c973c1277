#!/bin/sh
# Runs convert.py for the scripts in the folders of the families.
#
#   sh run_order.sh ORDER ARGUMENT...
#
# With the Python of the active virtual environment, else the one in .venv of this checkout, else python3.
set -eu
here=$(dirname -- "$(readlink -f -- "$0")")
python=$here/../../.venv/bin/python
if [ -n "${VIRTUAL_ENV:-}" ] || [ ! -x "$python" ]; then python=python3; fi
exec "$python" "$here/convert.py" "$@"
