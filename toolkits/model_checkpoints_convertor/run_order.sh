#!/bin/sh
# Runs convert.py for the scripts in the folders of the families.
#
#   sh run_order.sh ORDER ARGUMENT...
set -eu
here=$(dirname -- "$(readlink -f -- "$0")")
exec sh "$here/../run_python.sh" "$here/convert.py" "$@"
