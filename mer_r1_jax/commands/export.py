"""Exports a model to Hugging Face format: mer-r1 export --run=RUN_DIR --out=DIR [--layout=omni | --base=FULL_OMNI_DIR]

A run with adapters (model.lora.rank) is exported with them merged; --adapter writes them alone, as a PEFT folder.
--model=BASE --merge=PEFT_DIR merges such a folder into its base.

--run takes the newest valid checkpoint of a run and puts its settings beside it, --model an existing Hugging Face
directory (to change its dtype, shards or naming, or to put its Thinker into a full Omni directory with --base).
transformers 4.57 and 5.x load the result; --layout=omni makes the directory that vLLM serves, without a voice.
"""

from absl import app, flags

from mer_r1_jax import screen
from mer_r1_jax.cli import explained

_RUN = flags.DEFINE_string("run", None, "Folder of a run, <output_dir>/<run_name>; may be gs://.")
_MODEL = flags.DEFINE_string("model", None, "Hugging Face directory of a Thinker or of a full Omni model.")
_OUT = flags.DEFINE_string("out", None, "Directory to write.", required=True)
_LAYOUT = flags.DEFINE_enum(
    "layout",
    "thinker",
    ("thinker", "omni"),
    "thinker: for transformers' Thinker class; omni: as a full Omni model without a voice, for vLLM and transformers' "
    "Omni class.",
)
_BASE = flags.DEFINE_string(
    "base", None, "Full Omni directory whose talker, vocoder and other files are copied verbatim."
)
_ADAPTER = flags.DEFINE_bool("adapter", False, "Write the adapters of a --run alone, as a folder that peft loads.")
_MERGE = flags.DEFINE_string("merge", None, "PEFT folder of adapters that are merged into --model.")
_DTYPE = flags.DEFINE_enum("dtype", "bfloat16", ("float32", "bfloat16", "float16"), "Dtype of the written weights.")
_SHARD = flags.DEFINE_string("max_shard_size", "5GB", "Most bytes of one file; more makes shards with an index.")
_OVERWRITE = flags.DEFINE_bool("overwrite", False, "Replace an earlier export at --out.")

flags.mark_flags_as_mutual_exclusive(["run", "model"], required=True)


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}")
    from mer_r1_jax.omni.hf.export import ExportSettings, export_model
    from mer_r1_jax.run.fitted_gate import write_gate
    from mer_r1_jax.run.policy import refuse_in_run, saved_config, write_settings

    with explained():
        # Not where a run that goes on would take it for its own last export.
        refuse_in_run(_OUT.value)
        if _MERGE.value and _RUN.value:
            raise app.UsageError(
                "--merge: got it beside --run, expected --model: a run's own adapters are merged by themselves"
            )
        if _ADAPTER.value:
            _export_adapters()
            return
        config, params, source = _run_parameters(_RUN.value) if _RUN.value else _model_parameters(_MODEL.value or "")
        report = export_model(
            _OUT.value,
            config,
            params,
            ExportSettings(
                layout=_LAYOUT.value,
                source=source,
                base=_BASE.value,
                dtype=_DTYPE.value,
                max_shard_size=_SHARD.value,
                overwrite=_OVERWRITE.value,
            ),
        )
        if _RUN.value and (settings := saved_config(_RUN.value)) is not None:
            # What `--mode=auto` takes; a run without held-out clips has none.
            if problem := write_gate(report.directory, _RUN.value):
                screen.say(problem, error=True)
            # The run's configuration lies beside its export: prompts and clips have to be made as the run made them.
            write_settings(report.directory, settings)
    screen.say(
        f"{report.directory}: {report.tensors} tensors, {report.parameters:,} parameters, {report.nbytes / 1e9:.3g} GB "
        f"in {len(report.weight_files)} file(s); {report.verbatim_tensors} tensors of the base copied verbatim"
    )
    screen.say(f"copied: {', '.join(report.copied_files) or 'nothing'}")
    if report.left_out:
        screen.say(f"left out, as weights in other formats: {', '.join(report.left_out)}")


def _export_adapters() -> None:
    """Writes the PEFT folder of a run."""
    from mer_r1_jax.omni.hf.peft_folder import save_adapters
    from mer_r1_jax.run.policy import load_run_adapters

    named = [flag for flag, value in (("--model", _MODEL.value), ("--base", _BASE.value)) if value]
    if named or not _RUN.value:
        raise app.UsageError(
            f"--adapter: got {' and '.join(named) or 'no run'} beside it, expected --run=RUN_DIR and --out=DIR; leave "
            "--adapter out to export a whole model"
        )
    shaped = [f"--{flag.name}" for flag in (_DTYPE, _LAYOUT, _SHARD, _MERGE) if flag.present]
    if shaped:
        raise app.UsageError(
            f"--adapter: got {' and '.join(shaped)} beside it, which say how a whole model is written; expected none "
            "of them: adapters are written in one file, as they were trained"
        )
    config, adapters, base = load_run_adapters(_RUN.value)
    tensors = save_adapters(_OUT.value, config, adapters, base=base, overwrite=_OVERWRITE.value)
    parameters = sum(int(leaf.size) for leaf in adapters.values())
    screen.say(
        f"{_OUT.value}: adapters of rank {config.adapters.rank}, {tensors} tensors, {parameters:,} parameters; they "
        f"belong to {base or 'the random weights of that run'}"
    )


def _model_parameters(model: str):
    """(config, parameters, where the tokenizer lies) of a Hugging Face directory, with --merge's adapters."""
    from mer_r1_jax.omni.hf.config_json import load_config
    from mer_r1_jax.omni.hf.load import left_in_files
    from mer_r1_jax.omni.hf.peft_folder import with_adapters

    config = load_config(model)
    params = left_in_files(model, config)
    return (*(with_adapters(config, params, _MERGE.value) if _MERGE.value else (config, params)), model)


def _run_parameters(run: str):
    """The same of a run's newest valid checkpoint."""
    from mer_r1_jax.run.policy import load_policy

    return load_policy(run)
