"""Makes a synthetic data set: clips, records, tokenizer and ceiling. Safe to repeat: what is there already is kept."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import hashlib
import json
import multiprocessing
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from mer_r1_jax import faults
from mer_r1_jax.data.synthetic import wording
from mer_r1_jax.data.synthetic.world import (
    CATEGORIES,
    DEFAULT,
    MODALITIES,
    SETTINGS,
    SPLITS,
    WORLDS,
    Scene,
    WorldConfig,
    draw_scene,
    load_lexicon,
)
from mer_r1_jax.storage.atomic_files import writing

VERSION = 9  # counts changes of the drawing or the tokenizer that settings do not show
CLIPS_PER_TASK = 32
MAX_REASONING_TOKENS = 44  # with tags, answer and end a slow target stays within 64 tokens


class WorldError(ValueError):
    """A synthetic data set that cannot be made as asked."""


@dataclasses.dataclass(frozen=True)
class WorldPaths:
    """Where the parts of a data set are. `media_root` is the folder itself."""

    root: Path

    @property
    def media_root(self) -> Path:
        return self.root

    @property
    def sft(self) -> Path:
        return self.root / "sft.jsonl"

    @property
    def rl(self) -> Path:
        return self.root / "rl.jsonl"

    @property
    def eval(self) -> Path:
        return self.root / "eval.jsonl"

    @property
    def tokenizer(self) -> Path:
        return self.root / "tokenizer"

    @property
    def oracle(self) -> Path:
        """JSON with the ceiling's, the single modalities' and the floor's scores on the held-out clips."""
        return self.root / "oracle.json"

    @property
    def manifest(self) -> Path:
        """Written last: its presence says that the data set is complete."""
        return self.root / "manifest.json"


@dataclasses.dataclass(frozen=True, kw_only=True)
class WorldSettings:
    """Everything a data set follows from.

    Attributes:
        sft_clips, rl_clips, eval_clips: how many clips; the three sets share none. An SFT clip has a record of every
            annotator.
        seed: every random choice follows from it.
        config: the world's probabilities.
        wheel_dir: emotion wheels; "" = the ones shipped.
    """

    sft_clips: int
    rl_clips: int
    eval_clips: int
    seed: int = 0
    config: WorldConfig = WORLDS[DEFAULT]
    wheel_dir: str = ""

    @property
    def counts(self) -> dict[str, int]:
        """Clips of each of SPLITS."""
        return dict(zip(SPLITS, (self.sft_clips, self.rl_clips, self.eval_clips), strict=True))

    def to_json(self, lexicon: dict) -> dict[str, Any]:
        """As the data set's folder keeps them."""
        content = hashlib.sha256(json.dumps(lexicon, sort_keys=True).encode()).hexdigest()
        settings = {
            "version": VERSION,
            "clips": self.counts,
            "seed": self.seed,
            "world": dataclasses.asdict(self.config),
            "lexicon_sha256": content,
            "wheel_dir": str(self.wheel_dir),
        }
        return json.loads(json.dumps(settings))


def make_world(
    root: str | Path,
    world: WorldSettings,
    *,
    workers: int = 2,
    progress: Callable[[int, int], None] | None = None,
) -> WorldPaths:
    """Makes a data set, or completes or reuses the one that is there.

    Args:
        root: its folder.
        world: what it follows from.
        workers: processes that draw and encode; 0 does it in this one.
        progress: called with (clips done, clips in all) now and then.

    Raises:
        WorldError: the folder holds a data set made with other settings, or a count is negative.
    """
    from mer_r1_jax.data.synthetic.oracle import Oracle
    from mer_r1_jax.data.synthetic.world_tokenizer import save_tokenizer, train_tokenizer
    from mer_r1_jax.emotion.wheels import load_wheels

    paths = WorldPaths(Path(root))
    counts, seed, config = world.counts, world.seed, world.config
    if min(counts.values()) < 0:
        raise WorldError(f"clip counts must not be negative, got {counts}")
    lexicon = load_lexicon()
    settings = world.to_json(lexicon)
    if _is_complete(paths, settings, counts):
        return paths
    (paths.root / "clips").mkdir(parents=True, exist_ok=True)
    _write(paths.root / SETTINGS, json.dumps(settings, indent=1))
    _render_missing(paths, world, workers, progress)
    wheels = load_wheels(world.wheel_dir)
    tokenizer = train_tokenizer(lexicon, wheels)
    save_tokenizer(tokenizer, paths.tokenizer)
    oracle = Oracle(config, lexicon, wheels)
    scenes = {s: [draw_scene(seed, s, i, lexicon, config) for i in range(counts[s])] for s in ("rl", "eval")}
    annotated = (
        draw_scene(seed, "sft", index, lexicon, config, annotator)
        for annotator in range(config.annotators)
        for index in range(world.sft_clips)
    )
    _write_lines(paths.sft, (_sft_row(scene, lexicon, config, tokenizer) for scene in annotated))
    _write_lines(paths.rl, (_row(scene, lexicon) for scene in scenes["rl"]))
    _write_lines(paths.eval, (_eval_row(scene, lexicon, oracle) for scene in scenes["eval"]))
    _write(paths.oracle, json.dumps(_ceiling(scenes["eval"], oracle), indent=1))
    manifest = {"settings": settings, "clips": sum(counts.values()), "sha256": _hashes(paths)}
    _write(paths.manifest, json.dumps(manifest, indent=1))
    return paths


def clip_path(scene: Scene) -> str:
    """The clip's path relative to the data set's folder."""
    return f"clips/{scene.name}.mp4"


def _is_complete(paths: WorldPaths, settings: dict, counts: dict[str, int]) -> bool:
    """Whether the folder holds this data set whole.

    Raises:
        WorldError: it holds another one.
    """
    started = paths.root / SETTINGS
    if not started.exists():
        return False
    found = json.loads(started.read_text())
    if isinstance(found.get("world"), dict):
        found["world"].setdefault("concludes", True)  # every world of before this setting did
    if found != settings:
        changed = sorted(name for name in settings if found.get(name) != settings[name])
        former = "; data.synthetic_world=concluding was the default until it became U" if "world" in changed else ""
        raise WorldError(
            f"{paths.root} holds a synthetic data set made with other settings ({', '.join(changed)} differ): "
            f"choose another folder or delete it{former}"
        )
    if not paths.manifest.exists():
        return False
    present = {path.name for path in (paths.root / "clips").glob("*.mp4")}
    expected = {f"{split}-{index:06d}.mp4" for split, count in counts.items() for index in range(count)}
    return expected <= present and json.loads(paths.manifest.read_text())["sha256"] == _hashes(paths)


def _hashes(paths: WorldPaths) -> dict[str, str]:
    files = (paths.sft, paths.rl, paths.eval, paths.oracle, paths.tokenizer / "tokenizer.json")
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() if path.exists() else "" for path in files}


def _render_missing(paths: WorldPaths, world: WorldSettings, workers: int, progress) -> None:
    """Draws and encodes the clips that are not there yet."""
    wanted = [(split, index) for split, count in world.counts.items() for index in range(count)]
    missing = [(s, i) for s, i in wanted if not (paths.root / f"clips/{s}-{i:06d}.mp4").exists()]
    tasks = [missing[start : start + CLIPS_PER_TASK] for start in range(0, len(missing), CLIPS_PER_TASK)]
    done = len(wanted) - len(missing)
    for count in _run_tasks(tasks, (str(paths.root), world.seed, world.config), workers):
        done += count
        if progress is not None:
            progress(done, len(wanted))


def _run_tasks(tasks, arguments, workers: int) -> Iterator[int]:
    if workers == 0 or len(tasks) < 2:
        for task in tasks:
            yield _render_task(task, *arguments)
        return
    # spawn, because a forked process must not inherit the threads of an initialised jax.
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(workers, mp_context=context) as pool:
        futures = [pool.submit(_render_task, task, *arguments) for task in tasks]
        for future in concurrent.futures.as_completed(futures):
            yield future.result()


def _render_task(task, root: str, seed: int, config: WorldConfig) -> int:
    from mer_r1_jax.data.synthetic.render import render_scene, write_clip

    faults.here("render_task")
    lexicon = load_lexicon()
    for split, index in task:
        scene = draw_scene(seed, split, index, lexicon, config)
        write_clip(Path(root) / clip_path(scene), *render_scene(scene))
    return len(task)


def _row(scene: Scene, lexicon: dict) -> dict:
    """A record with the clean truth."""
    return {
        "id": scene.name,
        "question": wording.QUESTION,
        "videos": [clip_path(scene)],
        "audios": [clip_path(scene)],
        "subtitle": wording.subtitle(scene, lexicon)[0],
        "solution": list(scene.truth_words),
    }


def _sft_row(scene: Scene, lexicon: dict, config: WorldConfig, tokenizer) -> dict:
    """A record with an annotator's noisy label, and a slow demonstration that keeps what it has evidence for."""
    trace, kept = wording.short_reasoning(
        scene, lexicon, config, lambda piece: len(tokenizer(piece)["input_ids"]), MAX_REASONING_TOKENS
    )
    target = wording.slow_target(trace, wording.slow_answer(scene, kept))
    row = _row(scene, lexicon) | {"id": f"{scene.name}-{scene.annotator}", "solution": list(scene.label_words)}
    question = row.pop("question")
    row["messages"] = [{"role": "user", "content": question}, {"role": "assistant", "content": target}]
    return row


def _eval_row(scene: Scene, lexicon: dict, oracle) -> dict:
    """A held-out record, with the cues and the oracle's answer in further columns."""
    answer = oracle.categories(oracle.answer(scene.cues))
    return _row(scene, lexicon) | {
        "cues": list(scene.cues),
        "truth_categories": [CATEGORIES[c] for c in scene.truth],
        "oracle": [lexicon["words"][CATEGORIES[c]][0] for c in answer],
    }


def _ceiling(scenes: list[Scene], oracle) -> dict:
    """Scores of the oracle, of oracles confined to one modality, and of the best constant answer."""
    if not scenes:
        return {}
    truths = [oracle.row(scene.truth) for scene in scenes]
    answers = {name: [oracle.answer(s.cues, name) for s in scenes] for name in (None, *MODALITIES)}
    answers["constant"] = [oracle.constant_answer()] * len(scenes)
    return {name or "oracle": dataclasses.asdict(oracle.score(truths, rows)) for name, rows in answers.items()}


def _write(path: Path, content: str) -> None:
    partial = path.with_name(f".{path.name}.part")
    with writing(path.name, path):
        try:
            partial.write_text(content, encoding="utf-8")
            os.replace(partial, path)
        except OSError:
            partial.unlink(missing_ok=True)
            raise


def _write_lines(path: Path, rows: Iterator[dict]) -> None:
    _write(path, "".join(json.dumps(row) + "\n" for row in rows))
