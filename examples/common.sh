# What the scripts in the folders of the families share; they read it with ".".
#
#   launch ORDER[,ORDER...] ARGUMENT... [--dry-run]
#
# With the Python of the active virtual environment, else the one in .venv of this checkout, else python3.
set -eu
examples=$(dirname -- "$(readlink -f -- "$0")")/..

launch() {
    exec sh "$examples/../toolkits/run_python.sh" "$examples/launcher/launch.py" "$@"
}
