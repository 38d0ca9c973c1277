#!/bin/sh
# Runs make_samples.py for the scripts beside it.
#
#   sh run_order.sh ORDER ARGUMENT...
set -eu
here=$(dirname -- "$(readlink -f -- "$0")")
exec sh "$here/../run_python.sh" "$here/make_samples.py" "$@"
