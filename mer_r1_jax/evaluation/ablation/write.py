"""Writes an ablation where people look: ablation.json, ablation.md with ablation.svg, ablation.html."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mer_r1_jax.evaluation.ablation.comparison import Ablation, as_json
from mer_r1_jax.evaluation.ablation.figure import draw
from mer_r1_jax.evaluation.ablation.narrative import describe
from mer_r1_jax.evaluation.ablation.tables import markdown, tables_of
from mer_r1_jax.evaluation.figures import data_uri
from mer_r1_jax.evaluation.page import render_page
from mer_r1_jax.foreign_text import for_markdown, printable
from mer_r1_jax.storage import durable

FIGURE = "ablation.svg"


def write(folder: Path, ablation: Ablation, command: str, plan: Mapping[str, Any], setting: str) -> list[Path]:
    """Writes the four files and returns their paths.

    Args:
        folder: where.
        command: that made the ablation.
        plan: what was asked for, as JSON values.
        setting: what all runs have in common, in a sentence.
    """
    picture = draw(ablation)
    tables = tables_of(ablation)
    paragraphs = describe(ablation)
    text = "\n\n".join(
        ["## Ablation of the arms", for_markdown(setting), *paragraphs, f"![Scores, gains and curves]({FIGURE})"]
        + [markdown(table).rstrip() for table in tables]
        + [f"Made by\n\n```bash\n{printable(command)}\n```\n"]
    )
    html = render_page(
        "ablation/ablation.html.jinja",
        setting=setting,
        paragraphs=paragraphs,
        figure=data_uri(picture),
        tables=tables,
        command=command,
        plan=json.dumps(plan, indent=2, ensure_ascii=False),
    )
    content = json.dumps({"command": command, "plan": plan, **as_json(ablation)}, indent=1, allow_nan=False)
    files = {FIGURE: picture, "ablation.md": text.encode(), "ablation.html": html.encode()}
    files["ablation.json"] = (content + "\n").encode()
    for name, data in files.items():
        durable.write_atomically(folder / name, lambda file, data=data: file.write(data))
    return [folder / name for name in files]
