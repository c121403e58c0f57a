"""The launchers name what is there: the training command, fields of the schema, hosts that fit their slice, extras.

None of them is run on the machines it is for; stand-ins of `gcloud`, `srun` and `scontrol` write down their calls.
"""

import ast
import configparser
import copy
import math
import re
import shlex
import subprocess
from fnmatch import fnmatch
from importlib import metadata

import jsonschema
import pytest
import yaml
from jax.sharding import AbstractMesh
from packaging.requirements import Requirement
from support.jobset_schema import JOBSET
from support.page_commands import check
from support.pinned import pinned_versions
from support.small_run import REPOSITORY

from mer_r1_jax.cli import EXIT_ERROR
from mer_r1_jax.config.build import load_config
from mer_r1_jax.config.names import field_names
from mer_r1_jax.parallel.mesh import AXES, mesh_sizes
from mer_r1_jax.parallel.processes import EXIT_PEER_LOST, SETTINGS
from mer_r1_jax.training.phase import check_rows
from mer_r1_jax.training.signals import EXIT_SAVED

LAUNCH = REPOSITORY / "experiments/launch"
PAGE = REPOSITORY / "docs/launching.md"
CHIPS_PER_HOST = 4
HOSTS = {"v5e:2x4": 1}  # Cloud TPU has a VM of 8 chips for it; on GKE it is two of 4, as everywhere else
JOBSETS = ("jobset.yaml", "jobset_gpu.yaml")
SCRIPTS = ("tpu_vm.sh", "worker.sh", "slurm.sh")


@pytest.fixture(scope="module", params=JOBSETS)
def jobset(request):
    return yaml.safe_load((LAUNCH / request.param).read_text())


def job_of(jobset):
    (replicated,) = jobset["spec"]["replicatedJobs"]
    return replicated["template"]["spec"]


def container_of(jobset):
    (container,) = job_of(jobset)["template"]["spec"]["containers"]
    return container


def devices_of(jobset):
    """Chips or cards of all its pods."""
    (count,) = container_of(jobset)["resources"]["limits"].values()
    return count * job_of(jobset)["parallelism"]


def command_of(jobset):
    """(name of the configuration, its overrides by field) of the container's command."""
    _, _, config, *overrides = container_of(jobset)["command"]
    pairs = (override.removeprefix("--config.").partition("=") for override in overrides)
    return config.removeprefix("--config="), {name: value for name, _, value in pairs}


def test_a_jobset_says_nothing_that_kubernetes_does_not_know(jobset):
    jsonschema.validate(jobset, JOBSET)
    # JobSet names pods after set, replicated job, and two numbers, and refuses names of more than 63 characters.
    assert len(f"{jobset['metadata']['name']}-node-0-99") < 63


@pytest.mark.parametrize(
    "mistake",
    [
        lambda jobset: jobset["spec"].update(replicatedJob=[]),
        lambda jobset: job_of(jobset).update(parallelism="4"),
        lambda jobset: job_of(jobset)["template"]["spec"].pop("containers"),
        lambda jobset: container_of(jobset).update(imagePullPolicy="Sometimes"),
        lambda jobset: container_of(jobset).update(env=[{"name": "A", "value": 2}]),
        lambda jobset: job_of(jobset)["podFailurePolicy"]["rules"][0].update(action="FailJobSet"),
    ],
)
def test_the_schema_of_a_jobset_finds_mistakes(jobset, mistake):
    wrong = copy.deepcopy(jobset)
    mistake(wrong)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(wrong, JOBSET)


def test_a_jobset_runs_the_training_command_with_settings_it_takes(jobset, monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    container = container_of(jobset)
    python, script, *words = container["command"]
    assert python == "python" and script == "experiments/train.py" and (REPOSITORY / script).is_file()
    assert container["workingDir"] == "/mer-r1-jax"  # where the image has the repository
    check("train", [word.replace("BUCKET", "bucket") for word in words])
    mounts = tuple(mount["mountPath"] for mount in container["volumeMounts"])
    for name, value in command_of(jobset)[1].items():
        assert name in field_names()
        assert "/" not in value or value.startswith((*mounts, "gs://")), name


def test_the_devices_of_a_jobset_share_the_prompts_of_a_step(jobset):
    config, overrides = command_of(jobset)
    prompts = {name: int(value) for name, value in overrides.items() if name.endswith("prompts_per_step")}
    config = load_config(REPOSITORY / config, prompts)
    sizes = mesh_sizes(config.mesh, devices_of(jobset))
    check_rows(config, AbstractMesh(sizes, AXES))


def test_a_jobset_starts_one_process_for_each_host(jobset):
    job = job_of(jobset)
    assert job["parallelism"] == job["completions"] > 1
    selector, limits = job["template"]["spec"]["nodeSelector"], container_of(jobset)["resources"]["limits"]
    if "cloud.google.com/gke-tpu-topology" in selector:
        topology = selector["cloud.google.com/gke-tpu-topology"]
        assert limits == {"google.com/tpu": CHIPS_PER_HOST}
        assert devices_of(jobset) == math.prod(map(int, topology.split("x")))
        assert command_of(jobset)[0].endswith(f":v5p:{topology}")
    else:
        assert limits == {"nvidia.com/gpu": 8} and command_of(jobset)[0].endswith(":h100:8")


def test_the_gpu_jobset_tells_its_processes_of_each_other():
    jobset = yaml.safe_load((LAUNCH / "jobset_gpu.yaml").read_text())
    name, (replicated,) = jobset["metadata"]["name"], jobset["spec"]["replicatedJobs"]
    environment = {entry["name"]: entry for entry in container_of(jobset)["env"]}
    assert set(environment) == set(SETTINGS)
    host, _, port = environment["JAX_COORDINATOR_ADDRESS"]["value"].partition(":")
    assert host == f"{name}-{replicated['name']}-0-0.{name}" and jobset["spec"]["network"]["enableDNSHostnames"]
    assert int(port) in [port["containerPort"] for port in container_of(jobset)["ports"]]
    assert environment["JAX_NUM_PROCESSES"]["value"] == str(job_of(jobset)["parallelism"])
    assert "job-completion-index" in environment["JAX_PROCESS_ID"]["valueFrom"]["fieldRef"]["fieldPath"]
    assert job_of(jobset)["completionMode"] == "Indexed"


def test_a_jobset_starts_again_unless_the_run_was_refused(jobset):
    job = job_of(jobset)
    assert jobset["spec"]["failurePolicy"]["maxRestarts"] > 0 and job["backoffLimit"] == 0
    (rule,) = job["podFailurePolicy"]["rules"]
    assert rule["action"] == "FailJob" and rule["onExitCodes"]["values"] == [EXIT_ERROR]
    assert rule["onExitCodes"]["containerName"] == container_of(jobset)["name"]
    grace = float(command_of(jobset)[1]["train.preemption_grace_seconds"].split()[0])
    assert grace < job["template"]["spec"]["terminationGracePeriodSeconds"]


def instructions(name):
    """(instruction, its words) of a Dockerfile."""
    lines = [line for line in (LAUNCH / name).read_text().splitlines() if line and not line.startswith("#")]
    return [(line.split(" ", 1)[0], line.split(" ", 1)[1]) for line in lines]


@pytest.fixture(scope="module")
def setup_cfg():
    parser = configparser.ConfigParser()
    parser.read(REPOSITORY / "setup.cfg")
    return parser


def test_the_image_installs_extras_that_exist_on_a_python_that_is_new_enough(setup_cfg):
    said = dict(instructions("Dockerfile"))
    version = re.fullmatch(r"python:3\.(\d+)-slim", said["FROM"])
    assert f"Programming Language :: Python :: 3.{version[1]}" in setup_cfg["metadata"]["classifiers"]
    extras = set(setup_cfg["options.extras_require"])
    mentioned = re.findall(r"EXTRAS=([\w,]+)", (LAUNCH / "Dockerfile").read_text() + PAGE.read_text())
    assert {"tpu,gcs", "cuda,gcs"} == set(mentioned)
    assert all(set(names.split(",")) <= extras for names in mentioned)
    words = shlex.split(said["RUN"])
    assert words[words.index("-c") + 1] == "requirements.txt" and words[-2:] == ["-e", ".[${EXTRAS}]"]
    assert said["WORKDIR"] == "/mer-r1-jax" and said["COPY"] == ". ."


@pytest.mark.parametrize("extra", ["tpu", "cuda", "gcs"])
def test_pinned_versions_leave_an_extra_installable(setup_cfg, extra):
    """`pip install -c requirements.txt -e '.[tpu]'` fails where jax's own extra wants another version than the pin."""
    pins = pinned_versions(REPOSITORY / "requirements.txt")
    for wanted in map(Requirement, setup_cfg["options.extras_require"][extra].split()):
        brought = [Requirement(text) for text in metadata.requires(wanted.name) or ()]
        chosen = [need for need in brought if need.marker and any(need.marker.evaluate({"extra": name})
                                                                  for name in wanted.extras)]  # fmt: skip
        assert bool(chosen) == bool(wanted.extras)
        for need in (wanted, *chosen):
            assert need.name not in pins or need.specifier.contains(pins[need.name]), (
                f"{need} against {pins[need.name]}"
            )


def test_the_image_has_all_that_the_package_is_made_of_and_nothing_else(setup_cfg):
    *_, lines = [(LAUNCH / "Dockerfile.dockerignore").read_text().splitlines()]
    everything, *rules = [line for line in lines if line and not line.startswith("#")]
    kept = {rule[1:] for rule in rules if rule.startswith("!")}
    assert everything == "*" and all((REPOSITORY / name).exists() for name in kept)
    folders = {path.strip().split("=")[1].strip().split("/")[0]
               for path in setup_cfg["options"]["package_dir"].strip().splitlines()}  # fmt: skip
    readme = setup_cfg["metadata"]["long_description"].removeprefix("file: ")
    assert folders | {readme, "setup.cfg", "pyproject.toml", "requirements.txt", "experiments"} == kept
    # Caches are left out of what is kept.
    left_out = [rule for rule in rules if not rule.startswith("!")]
    assert any(fnmatch("mer_r1_jax/__pycache__", rule) for rule in left_out)


@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_parse_and_can_be_run(script):
    assert (LAUNCH / script).stat().st_mode & 0o111
    subprocess.run(["bash", "-n", LAUNCH / script], check=True)


@pytest.mark.parametrize(
    "file", [PAGE, *sorted(path for path in LAUNCH.iterdir() if path.is_file())], ids=lambda f: f.name
)
def test_texts_name_fields_and_files_that_exist(file):
    text = file.read_text()
    for name in re.findall(r"--config\.([\w.]+)=", text):
        assert name in field_names(), name
    for path in re.findall(r"(?:experiments|tests|docs|mer_r1_jax)/[\w/]+\.(?:py|sh|yaml|md)", text):
        assert (REPOSITORY / path).is_file(), path


def test_every_launcher_is_on_the_page_with_whether_it_was_run():
    rows = re.findall(r"^\| `([\w.]+)` \| .* \| (.*) \|$", PAGE.read_text(), re.MULTILINE)
    names = {path.name for path in LAUNCH.iterdir()} - {"README.md", "Dockerfile.dockerignore"}
    assert names <= {name for name, _ in rows}
    assert all(said.startswith(("no", "its restarts")) for name, said in rows if name in names)


def standing_in(folder, **scripts):
    """A folder of small programs for PATH, each a bash script."""
    for name, script in scripts.items():
        (folder / name).write_text(f"#!/bin/bash\n{script}\n")
        (folder / name).chmod(0o755)
    return {"PATH": f"{folder}:/usr/bin:/bin", "HOME": str(folder)}


# Flags of `gcloud compute tpus ...` by its reference page.
GCLOUD = {
    "queued-resources create": {
        "--node-id",
        "--zone",
        "--accelerator-type",
        "--runtime-version",
        "--spot",
        "--service-account",
    },  # fmt: skip
    "queued-resources describe": {"--zone", "--format"},
    "queued-resources delete": {"--zone", "--force"},
    "tpu-vm ssh": {"--zone", "--worker", "--command"},
}


def tpu_vm(folder, *words, **settings):
    """(what gcloud was asked for, its flags) after `tpu_vm.sh WORDS`; None where it was not called."""
    environment = standing_in(folder, gcloud=f'printf "%s\\0" "$@" > {folder}/called')
    environment |= {"TPU_NAME": "mine", "ZONE": "z", "REPOSITORY": "https://host/mer-r1-jax", **settings}
    (folder / "called").unlink(missing_ok=True)
    done = subprocess.run([LAUNCH / "tpu_vm.sh", *words], env=environment, capture_output=True, text=True)
    if done.returncode:
        return done
    compute, tpus, group, verb, name, *rest = (folder / "called").read_text().split("\0")[:-1]
    assert (compute, tpus, name) == ("compute", "tpus", "mine")
    given = dict(word.partition("=")[::2] for word in rest)
    assert set(given) <= GCLOUD[f"{group} {verb}"], given
    return f"{group} {verb}", given


def slices():
    """Slice -> configurations of this package that are laid out for it."""
    found = {}
    for file in sorted((REPOSITORY / "experiments/configs").glob("omni_*.py")):
        for node in ast.parse(file.read_text()).body:
            if isinstance(node, ast.Assign) and node.targets[0].id in {"SLICES", "ADAPTED_SLICES"}:
                for name in ast.literal_eval(node.value):
                    found.setdefault(name, []).append(file.stem)
    return found


@pytest.mark.parametrize("slice_name", slices())
def test_a_slice_of_a_configuration_is_asked_for_by_the_names_of_cloud_tpu(tmp_path, slice_name):
    verb, given = tpu_vm(tmp_path, "create", SLICE=slice_name, SPOT="1")
    assert verb == "queued-resources create" and given["--node-id"] == "mine" and "--spot" in given
    generation, _, topology = slice_name.partition(":")
    chips = math.prod(map(int, topology.split("x")))
    prefix, image, per_chip = {
        "v5e": ("v5litepod", "v2-alpha-tpuv5-lite", 1),
        "v5p": ("v5p", "v2-alpha-tpuv5", 2),
        "v6e": ("v6e", "v2-alpha-tpuv6e", 1),
    }[generation]
    assert given["--accelerator-type"] == f"{prefix}-{chips * per_chip}"
    assert given["--runtime-version"] == image
    # The page's tables have the same.
    page = PAGE.read_text()
    (row,) = re.findall(rf"^\| `{re.escape(slice_name)}` \| (`v.*) \|$", page, re.MULTILINE)
    assert f"`{given['--accelerator-type']}`" in row and f"`{image}`" in row
    hosts = HOSTS.get(slice_name, chips // CHIPS_PER_HOST)
    assert f"| {hosts} |" in row and all(f"`{name}`" in row for name in slices()[slice_name])
    (row,) = re.findall(rf"^\| `{re.escape(slice_name)}` \| (`tpu-.*) \|$", page, re.MULTILINE)
    assert row.endswith(f"| {chips // CHIPS_PER_HOST}") and f"`{topology}`" in row


def test_what_the_queue_is_asked(tmp_path):
    verb, given = tpu_vm(tmp_path, "create")
    assert given["--accelerator-type"] == "v5p-32" and not {"--spot", "--service-account"} & set(given)
    _, given = tpu_vm(tmp_path, "create", SLICE="v6e:8x8", ACCELERATOR_TYPE="v6e-64", RUNTIME_VERSION="v2-alpha-tpuv6e")
    assert given["--accelerator-type"] == "v6e-64"
    assert tpu_vm(tmp_path, "status")[0] == "queued-resources describe"
    verb, given = tpu_vm(tmp_path, "delete")
    assert verb == "queued-resources delete" and "--force" in given
    refused = tpu_vm(tmp_path, "create", SLICE="v9:1x1")
    assert refused.returncode == 2 and "got v9:1x1, expected v5e:2x4, v5e:4x4" in refused.stderr
    assert tpu_vm(tmp_path, "destroy").returncode == 2


def test_setup_brings_python_and_the_program_to_every_host_once(tmp_path):
    _, given = tpu_vm(tmp_path, "setup")
    assert given["--worker"] == "all"
    uv = f'echo "uv $*" >> {tmp_path}/log; [ "$1" != venv ] || {{ mkdir -p .venv/bin; touch .venv/bin/python; chmod +x .venv/bin/python; }}'  # noqa: E501
    environment = standing_in(
        tmp_path,
        curl=f'echo "curl $*" >> {tmp_path}/log; cat {tmp_path}/installer',
        git=f'echo "git $*" >> {tmp_path}/log; mkdir mer-r1-jax',
        uv=uv,
    )
    (tmp_path / "installer").write_text(f"mkdir -p {tmp_path}/.local/bin; cp {tmp_path}/uv {tmp_path}/.local/bin/uv\n")
    for _ in range(2):
        subprocess.run(["bash", "-c", given["--command"]], env=environment, cwd=tmp_path, check=True)
    install = "uv pip install --quiet --python .venv/bin/python -c requirements.txt -e .[tpu,gcs]"
    assert (tmp_path / "log").read_text().splitlines() == [
        "curl -LsSf https://astral.sh/uv/install.sh",
        "git clone https://host/mer-r1-jax mer-r1-jax",
        "uv venv --python 3.12 .venv",
        install,
        install,
    ]


def test_train_hands_its_flags_on_to_every_host(tmp_path):
    _, given = tpu_vm(tmp_path, "train", "--config=omni_7b", "--config.data.question=What is felt?")
    assert given["--worker"] == "all"
    line = next(line for line in given["--command"].split("&&") if "worker.sh" in line)
    words = shlex.split(line.partition(">")[0])
    assert words[-2:] == ["--config=omni_7b", "--config.data.question=What is felt?"]


@pytest.mark.parametrize(("status", "queued_again"), [(0, False), (EXIT_SAVED, True), (EXIT_ERROR, False)])
def test_slurm_starts_one_process_a_node_and_queues_again_after_a_save(tmp_path, status, queued_again):
    worker = tmp_path / "experiments/launch/worker.sh"
    worker.parent.mkdir(parents=True)
    worker.write_text(f'#!/bin/bash\nenv | grep "^JAX_" | sort | tr "\\n" " " >> {tmp_path}/told\n'
                      f'echo "$@" >> {tmp_path}/told\nexit {status}\n')  # fmt: skip
    worker.chmod(0o755)
    environment = standing_in(
        tmp_path,
        scontrol=f'[ "$1" = show ] && printf "node7\\nnode9\\n" || echo "$@" >> {tmp_path}/requeued',
        srun='shift; code=0; for n in 0 1; do SLURM_PROCID=$n "$@" || code=$?; done; exit $code',
    )
    environment |= {"SLURM_SUBMIT_DIR": str(tmp_path), "SLURM_JOB_NODELIST": "node[7,9]", "SLURM_JOB_NUM_NODES": "2"}
    done = subprocess.run(
        [LAUNCH / "slurm.sh", "--config=omni_3b:h100:8", "--x=a b"],
        env=environment | {"SLURM_JOB_ID": "41"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == status, done.stderr
    told = (tmp_path / "told").read_text().splitlines()
    shared = "JAX_COORDINATOR_ADDRESS=node7:12321 JAX_NUM_PROCESSES=2 JAX_PROCESS_ID="
    assert told == [f"{shared}{number} --config=omni_3b:h100:8 --x=a b" for number in (0, 1)]
    assert (tmp_path / "requeued").exists() is queued_again


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
