#!/usr/bin/env bash
# One training run on a TPU VM slice, from this machine. NOT RUN SO FAR: no slice was at hand.
#   experiments/launch/tpu_vm.sh create | setup | train [flags of experiments/train.py] | log | stop | delete
# The settings below come from the environment. Data and runs lie in a bucket, gs://... (README.md).
set -eu
name=${TPU_NAME:?name of the TPU VM} zone=${ZONE:?its zone}
type=${ACCELERATOR_TYPE:-v5p-32} version=${RUNTIME_VERSION:-v2-alpha-tpuv5}
repository=${REPOSITORY:-}

on_all_hosts() { gcloud compute tpus tpu-vm ssh "$name" --zone="$zone" --worker=all --command="$1"; }

action=${1:-}
[ $# -gt 0 ] && shift
case $action in
    create)
        gcloud compute tpus tpu-vm create "$name" --zone="$zone" --accelerator-type="$type" --version="$version" ${SPOT:+--spot}
        ;;
    setup)
        : "${repository:?address git clones the program from}"
        on_all_hosts "set -e
            test -d mer-r1-jax || git clone $repository mer-r1-jax
            cd mer-r1-jax && python3 -m venv .venv
            .venv/bin/python -m pip install -q -c requirements.txt -e '.[tpu,gcs]'"
        ;;
    train)
        flags=$(printf ' %q' "$@")
        on_all_hosts "cd mer-r1-jax && nohup experiments/launch/worker.sh$flags > ~/train.log 2>&1 & echo \$! > ~/train.pid"
        ;;
    log) gcloud compute tpus tpu-vm ssh "$name" --zone="$zone" --worker="${WORKER:-0}" --command="tail -n 100 -f ~/train.log" ;;
    stop) on_all_hosts 'kill -TERM "$(cat ~/train.pid)"' ;;
    delete) gcloud compute tpus tpu-vm delete "$name" --zone="$zone" ;;
    *)
        sed -n '2,4s/^# //p' "$0" >&2
        exit 2
        ;;
esac
