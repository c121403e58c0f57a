"""The launchers name what is there: the training command, fields of the schema, and hosts that fit their slice."""

import math
import re
import subprocess

import pytest
import yaml
from support.small_run import REPOSITORY

from mer_r1_jax.cli import EXIT_ERROR
from mer_r1_jax.config.build import config_dict, from_mapping
from mer_r1_jax.config.checks import ON_DISK, PATHS
from mer_r1_jax.config.command_line import check_places
from mer_r1_jax.config.names import field_names
from mer_r1_jax.config.schema import ConfigError
from mer_r1_jax.parallel.processes import EXIT_PEER_LOST

LAUNCH = REPOSITORY / "experiments/launch"
CHIPS_PER_HOST = 4


@pytest.fixture(scope="module")
def jobset():
    return yaml.safe_load((LAUNCH / "jobset.yaml").read_text())


@pytest.fixture(scope="module")
def job(jobset):
    (replicated,) = jobset["spec"]["replicatedJobs"]
    return replicated["template"]["spec"]


def test_jobset_runs_the_training_command_with_fields_that_exist(job):
    (container,) = job["template"]["spec"]["containers"]
    python, script, config, *overrides = container["command"]
    assert python == "python" and (REPOSITORY / script).is_file() and script == "experiments/train.py"
    assert re.fullmatch(r"--config=experiments/configs/\w+\.py", config)
    mounts = tuple(mount["mountPath"] for mount in container["volumeMounts"])
    for override in overrides:
        name, _, value = override.removeprefix("--config.").partition("=")
        assert name in field_names(), override
        assert value.startswith((*mounts, "gs://")) or name == "train.run_name", override


def test_jobset_starts_one_process_for_each_host_of_its_slice(job):
    pod = job["template"]["spec"]
    chips = math.prod(map(int, pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x")))
    assert pod["containers"][0]["resources"]["limits"]["google.com/tpu"] == CHIPS_PER_HOST
    assert job["parallelism"] == job["completions"] == chips // CHIPS_PER_HOST


def test_jobset_starts_again_unless_the_run_was_refused(jobset, job):
    assert jobset["spec"]["failurePolicy"]["maxRestarts"] > 0 and job["backoffLimit"] == 0
    (rule,) = job["podFailurePolicy"]["rules"]
    assert rule["action"] == "FailJob" and rule["onExitCodes"]["values"] == [EXIT_ERROR]
    assert rule["onExitCodes"]["containerName"] == job["template"]["spec"]["containers"][0]["name"]


@pytest.mark.parametrize("script", ["tpu_vm.sh", "worker.sh"])
def test_scripts_parse_and_can_be_run(script):
    assert (LAUNCH / script).stat().st_mode & 0o111
    subprocess.run(["bash", "-n", LAUNCH / script], check=True)


def test_texts_name_fields_and_files_that_exist():
    for file in LAUNCH.iterdir():
        text = file.read_text()
        for name in re.findall(r"--config\.([\w.]+)=", text):
            assert name in field_names(), (file.name, name)
        for path in re.findall(r"(?:experiments|tests)/[\w/]+\.(?:py|sh)", text):
            assert (REPOSITORY / path).is_file() or path.startswith("experiments/configs/"), (file.name, path)


@pytest.mark.parametrize(("statuses", "starts"), [((EXIT_PEER_LOST, 134, 0), 3), ((75,), 1), ((2,), 1), ((76,) * 9, 4)])
def test_worker_starts_again_only_after_another_host_was_lost(tmp_path, statuses, starts):
    python = tmp_path / "python"
    (tmp_path / "statuses").write_text("\n".join(map(str, statuses)))
    python.write_text(
        f'#!/bin/sh\necho "$@" >> {tmp_path}/calls\n'
        f'exit "$(sed -n "$(wc -l < {tmp_path}/calls)p" {tmp_path}/statuses)"\n'
    )
    python.chmod(0o755)
    environment = {"PYTHON": str(python), "PAUSE": "0", "MAX_STARTS": "4", "PATH": "/usr/bin:/bin"}
    ended = subprocess.run([LAUNCH / "worker.sh", "--config=x.py", "--y=a b"], env=environment, capture_output=True)
    calls = (tmp_path / "calls").read_text().splitlines()
    assert ended.returncode == statuses[starts - 1] and calls == ["experiments/train.py --config=x.py --y=a b"] * starts


def config_with(field, value):
    config = config_dict()
    section, _, name = field.partition(".")
    config[section][name] = value
    if field == "model.adapter_path":
        config.model.lora.rank = 8  # adapters need a size
    return from_mapping(config)


@pytest.mark.parametrize("field", sorted(set(PATHS) - set(ON_DISK)))
def test_bucket_addresses_are_taken_and_other_storage_is_refused_with_what_to_do(field):
    assert config_with(field, "gs://bucket/folder")
    with pytest.raises(ConfigError, match=f"{field}: got 's3://bucket/folder', expected a path.*or gs://.*mount"):
        config_with(field, "s3://bucket/folder")
    for address in ("gs://", "gs:///folder", "gs://bucket//folder", "gs://bucket/../folder", "gs://Bucket/folder"):
        with pytest.raises(ConfigError, match=f"{field}: got '{address}', expected gs://<bucket>/<path>"):
            config_with(field, address)


@pytest.mark.parametrize("field", ON_DISK)
def test_what_must_be_on_a_disk_is_refused_in_a_bucket(field):
    with pytest.raises(ConfigError, match=f"{field}: got 'gs://bucket/folder', expected a folder on a disk"):
        config_with(field, "gs://bucket/folder")


@pytest.mark.parametrize("words", [["--model=gs://b/run"], ["--model", "gs://b/run"], ["--also=x,gs://b/run"]])
def test_flags_that_need_files_refuse_addresses_with_what_to_do(words):
    name = words[0].lstrip("-").partition("=")[0]
    with pytest.raises(ConfigError, match=f"--{name}: got 'gs://b/run', expected a path.*\n.*gcloud storage cp"):
        check_places(["evaluate.py", *words])


@pytest.mark.parametrize(
    "flags",
    [
        ["--run=gs://b/run", "--run", "gs://b/run", "--config.data.sft_path=gs://b/x", "--out=y"],
        ["--config.data.sft_path", "gs://b/x"],
    ],
)
def test_flags_that_may_name_a_bucket_are_left_alone(flags):
    assert check_places(["x.py", *flags]) is None
