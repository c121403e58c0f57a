#!/usr/bin/env bash
# Trains on this host of a slice, and again after another host was lost; to be started on every host alike:
#   experiments/launch/worker.sh --config=experiments/configs/omni_7b.py [further flags of experiments/train.py]
# PYTHON: the interpreter. MAX_STARTS: starts before it gives up. PAUSE: seconds between two.
set -u
cd "$(dirname "$0")/../.." || exit 1
python=${PYTHON:-.venv/bin/python}
for start in $(seq "${MAX_STARTS:-20}"); do
    "$python" experiments/train.py "$@" &
    child=$!
    trap 'kill -TERM "$child"' TERM INT  # the run saves, and ends with 75
    wait "$child"; status=$?
    while kill -0 "$child" 2>/dev/null; do wait "$child"; status=$?; done
    # 76: another process was lost. 134: jax noticed it first. Everything else is for a person, or done.
    case $status in
        76 | 134) echo "start $start ended with $status: another host was lost; starting again" >&2 ;;
        *) exit "$status" ;;
    esac
    sleep "${PAUSE:-30}"
done
exit "$status"
