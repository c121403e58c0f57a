"""What a launched run is told of places: buckets where they may be named, and a refusal where they may not."""

import pytest

from mer_r1_jax.config.build import config_dict, from_mapping
from mer_r1_jax.config.checks import ON_DISK, PATHS
from mer_r1_jax.config.command_line import check_places
from mer_r1_jax.config.schema import ConfigError


def config_with(field, value):
    config = config_dict()
    section, _, name = field.partition(".")
    config[section][name] = value
    if field == "model.adapter_path":
        config.model.lora.rank = 8  # adapters without a rank are refused for that
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
