"""What a model's own settings say before it is opened: of its run, its export, or an export that was copied."""

import dataclasses

from mer_r1_jax.config.schema import RunConfig
from mer_r1_jax.run.policy import extra_columns_of, remembered, write_settings


def test_an_export_keeps_its_settings_wherever_it_is_copied(tmp_path):
    plain = RunConfig()
    config = dataclasses.replace(
        plain,
        media=dataclasses.replace(plain.media, missing_audio="silence"),
        data=dataclasses.replace(plain.data, extra_columns=("speaker",)),
    )
    write_settings(tmp_path, config)
    found = remembered(tmp_path)
    assert found is not None and found.media.missing_audio == "silence"
    assert extra_columns_of(tmp_path) == ("speaker",)
    # A command's own settings go before them, also those of one name.
    assert extra_columns_of(tmp_path, {"data.extra_columns": []}) == ()
    assert extra_columns_of(tmp_path, {"data.extra_columns": "tone"}) == ("tone",)


def test_a_folder_of_another_tool_remembers_nothing(tmp_path):
    assert remembered(tmp_path) is None and extra_columns_of(tmp_path) == ()
