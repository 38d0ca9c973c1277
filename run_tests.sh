#!/usr/bin/env bash
# Runs the tests, in an environment that it makes when it is missing.
#
#   ./run_tests.sh [pytest arguments]            everything, in .venv
#   ./run_tests.sh --compat [pytest arguments]   the model, converter, training and generation tests in .venv-compat:
#                                                Python 3.12 and the newest megatron-core 0.19.x
#
# TORCH_SPEC chooses another torch than the tested one (see .ci/env.sh).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
source .ci/env.sh
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

case ${1:-} in
    -h | --help)
        sed -n '2,/^set/{s/^# \{0,1\}//;/^set/d;p}' "$0"
        ;;
    --compat)
        shift
        python=$(find_python 3.12)
        prepare_environment .venv-compat "$python" "$FOR_TESTS" 'megatron-core>=0.19,<0.20'
        exec .venv-compat/bin/python -m pytest tests/model tests/checkpoint tests/training tests/generation "$@"
        ;;
    *)
        [[ -x .venv/bin/python ]] || python=$(find_python 3.11 3.12 3.13)
        prepare_environment .venv "${python:-}" "$FOR_TESTS"
        exec .venv/bin/python -m pytest "$@"
        ;;
esac
