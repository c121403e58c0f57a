#!/usr/bin/env bash
# One training run on a TPU VM slice, from this machine. NOT RUN SO FAR: no slice was at hand.
#   experiments/launch/tpu_vm.sh create | status | setup | train [flags of experiments/train.py] | log | stop | delete
# The settings below come from the environment. Data and runs lie in a bucket, gs://... (docs/launching.md).
set -eu
name=${TPU_NAME:?name of the TPU VM} zone=${ZONE:?its zone}
slice=${SLICE:-v5p:2x2x4}
repository=${REPOSITORY:-}

# The slice as configurations and plans spell it -> Cloud TPU's accelerator type and the image of its VMs. In a type, v5e
# and v6e count chips, v5p counts TensorCores, two to a chip.
case $slice in
    v5e:2x4) type=v5litepod-8 version=v2-alpha-tpuv5-lite ;;
    v5e:4x4) type=v5litepod-16 version=v2-alpha-tpuv5-lite ;;
    v5e:16x16) type=v5litepod-256 version=v2-alpha-tpuv5-lite ;;
    v5p:2x2x4) type=v5p-32 version=v2-alpha-tpuv5 ;;
    v6e:4x4) type=v6e-16 version=v2-alpha-tpuv6e ;;
    *) type='' version='' ;;
esac
type=${ACCELERATOR_TYPE:-$type} version=${RUNTIME_VERSION:-$version}
if [ -z "$type" ] || [ -z "$version" ]; then
    echo "SLICE: got $slice, expected v5e:2x4, v5e:4x4, v5e:16x16, v5p:2x2x4 or v6e:4x4; for another slice set" \
        "ACCELERATOR_TYPE and RUNTIME_VERSION as well" >&2
    exit 2
fi

on_all_hosts() { gcloud compute tpus tpu-vm ssh "$name" --zone="$zone" --worker=all --command="$1"; }

action=${1:-}
[ $# -gt 0 ] && shift
case $action in
    create)  # a place in the queue; the VM and its place have the same name
        gcloud compute tpus queued-resources create "$name" --node-id="$name" --zone="$zone" \
            --accelerator-type="$type" --runtime-version="$version" ${SPOT:+--spot} \
            ${SERVICE_ACCOUNT:+--service-account="$SERVICE_ACCOUNT"}
        ;;
    status) gcloud compute tpus queued-resources describe "$name" --zone="$zone" --format='value(state.state)' ;;
    setup)
        : "${repository:?address git clones the program from}"
        # The image's own Python is 3.10, too old for this package, so uv brings one.
        on_all_hosts "set -e
            test -x ~/.local/bin/uv || curl -LsSf https://astral.sh/uv/install.sh | sh
            test -d mer-r1-jax || git clone $repository mer-r1-jax
            cd mer-r1-jax
            test -x .venv/bin/python || ~/.local/bin/uv venv --python 3.12 .venv
            ~/.local/bin/uv pip install --quiet --python .venv/bin/python -c requirements.txt -e '.[tpu,gcs]'"
        ;;
    train)
        flags=$(printf ' %q' "$@")
        on_all_hosts "cd mer-r1-jax && nohup experiments/launch/worker.sh$flags > ~/train.log 2>&1 & echo \$! > ~/train.pid"
        ;;
    log) gcloud compute tpus tpu-vm ssh "$name" --zone="$zone" --worker="${WORKER:-0}" --command="tail -n 100 -f ~/train.log" ;;
    stop) on_all_hosts 'kill -TERM "$(cat ~/train.pid)"' ;;
    delete) gcloud compute tpus queued-resources delete "$name" --zone="$zone" --force ;;  # the VM with it
    *)
        sed -n '2,4s/^# //p' "$0" >&2
        exit 2
        ;;
esac
