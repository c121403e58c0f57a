"""The eight tasks of MME-Emotion (arXiv 2508.09210), as its released question files have them, and published rows.

Folder names, counts and label separators: github.com/FunAudioLLM/MME-Emotion, folder MME-Emotion-Dataset at commit
777e8c3 (taken out of the repository later; the data set is on Hugging Face as Karl28/MME-Emotion).
"""

from __future__ import annotations

import dataclasses


class MmeError(ValueError):
    """MME-Emotion data, predictions or results that cannot be used as they are."""


RECOGNITION, REASONING, COT = METRICS = ("recognition", "reasoning", "cot")


@dataclasses.dataclass(frozen=True)
class Task:
    """One task.

    Attributes:
        name: as the paper writes it; also its folder.
        title: in words.
        count: items in the release.
        noun: what is to be recognised: emotion, sentiment or intent.
        separator: between the labels of one item; "" where an item has one label.
        hint: about its labels, for whoever answers and whoever judges; "" = nothing to add.
    """

    name: str
    title: str
    count: int
    noun: str
    separator: str = ""
    hint: str = ""

    @property
    def stem(self) -> str:
        """The name inside file names."""
        return self.name.replace("-", "_")

    @property
    def is_multi_label(self) -> bool:
        """Whether an item may have several labels; its recognition is then the share of them that is named."""
        return bool(self.separator)


TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task("ER-Lab", "emotion in the laboratory", 500, "emotion"),
        Task("ER-Wild", "emotion in the wild", 1800, "emotion"),
        Task("Noise-ER", "emotion under noise", 500, "emotion"),
        Task("FG-ER", "fine-grained emotion", 500, "emotion", ";"),
        Task("ML-ER", "several emotions at once", 600, "emotion", ","),
        Task("SA", "sentiment", 1600, "sentiment"),
        Task(
            "FG-SA",
            "fine-grained sentiment",
            500,
            "sentiment",
            hint="The degree is part of the sentiment: weak, plain, strong and very strong are four different answers.",
        ),
        Task("IR", "intent", 500, "intent"),
    )
}
TOTAL = sum(task.count for task in TASKS.values())

# CoT scores by task as MER-R1's paper (arXiv 2606.27652) reports them; pooled with the counts above they give its
# overall 45.3 and 51.5. Judged by gemini-3.1-flash-lite-preview, since the benchmark's own judge was gone.
PAPER_JUDGE = "gemini-3.1-flash-lite-preview"
PAPER_COT: dict[str, dict[str, float]] = {
    "MER-R1": {
        "ER-Lab": 57.3, "ER-Wild": 49.6, "Noise-ER": 72.1, "FG-ER": 38.7, "ML-ER": 42.2, "SA": 62.9, "FG-SA": 37.2,
        "IR": 33.9,
    },
    "Baseline": {
        "ER-Lab": 47.0, "ER-Wild": 40.8, "Noise-ER": 59.0, "FG-ER": 35.0, "ML-ER": 37.7, "SA": 58.7, "FG-SA": 35.6,
        "IR": 32.4,
    },
}  # fmt: skip
PAPER_OVERALL: dict[str, dict[str, float]] = {
    "MER-R1": {RECOGNITION: 38.4, REASONING: 64.6, COT: 51.5},
    "Baseline": {RECOGNITION: 27.9, REASONING: 62.7, COT: 45.3},
}
