#!/bin/sh
# Runs a Python file of a toolkit, for its shell scripts.
#
#   sh run_python.sh FILE ARGUMENT...
#
# With the Python of the active virtual environment, else the one in .venv of this checkout, else python3.
set -eu
here=$(dirname -- "$(readlink -f -- "$0")")
python=$here/../.venv/bin/python
if [ -n "${VIRTUAL_ENV:-}" ] || [ ! -x "$python" ]; then python=python3; fi
exec "$python" "$@"
