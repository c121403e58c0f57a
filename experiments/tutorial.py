"""Makes docs/tutorial.md, the site's page of the tutorial notebook, with its pictures. --execute runs it first.

    python experiments/tutorial.py [--execute]

The site's generator shows Markdown alone. A test holds that the page is that of the notebook.
"""

import base64
import json
import os
import pathlib
import sys
from typing import Any

from absl import app, flags

from mer_r1_jax import screen
from mer_r1_jax.cli import explained
from mer_r1_jax.storage import atomic_files

NOTEBOOK = pathlib.Path(__file__).parents[1] / "docs" / "tutorial.ipynb"
PICTURE = "tutorial_{}.png"  # beside the page, numbered from 1
NOTE = "This page is made from [a notebook](tutorial.ipynb) that you can run."

_EXECUTE = flags.DEFINE_bool("execute", False, "Runs the notebook and keeps its outputs; takes minutes.")


def main(argv: list[str]) -> int:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}; settings look like --execute")
    with explained():
        text = NOTEBOOK.read_text(encoding="utf-8")
        if _EXECUTE.value:
            text = executed(text, dict(os.environ))
            atomic_files.write_text(NOTEBOOK, text)
        markdown, pictures = page(json.loads(text))
        atomic_files.write_text(NOTEBOOK.with_suffix(".md"), markdown)
        for name, content in pictures.items():
            atomic_files.write_atomically(NOTEBOOK.with_name(name), lambda file, content=content: file.write(content))
    screen.say(NOTEBOOK.with_suffix(".md"))
    return 0


def executed(text: str, environment: dict[str, str]) -> str:
    """The notebook with the outputs of a run of its own.

    Args:
        text: of the notebook.
        environment: variables of the process that runs it.

    Raises:
        CellExecutionError: a cell failed.
    """
    import nbclient
    import nbformat

    notebook = nbformat.reads(text, as_version=4)
    # Times are left out: no two runs share them.
    client = nbclient.NotebookClient(notebook, timeout=None, record_timing=False, coalesce_streams=True)
    client.execute(env=environment)
    for cell in notebook.cells:
        if cell.cell_type == "code":  # what libraries warn of depends on what else is installed
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
    # Which Python ran it is of no interest.
    notebook.metadata.language_info = {"name": "python"}
    return nbformat.writes(notebook) + "\n"


def page(notebook: dict[str, Any]) -> tuple[str, dict[str, bytes]]:
    """The page as Markdown, and file name -> content of its pictures; of a notebook's JSON."""
    parts, pictures = [], {}
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(source)
            continue
        parts.append(f"```python\n{source}\n```")
        for output in cell["outputs"]:
            data = output.get("data", {})
            if "image/png" in data:
                name = PICTURE.format(len(pictures) + 1)
                pictures[name] = base64.b64decode(data["image/png"])
                parts.append(f"![What the cell above draws]({name})")
            elif printed := "".join(output.get("text") or data.get("text/plain", "")):
                parts.append(f"```text\n{printed.rstrip()}\n```")
    title, *rest = parts
    heading, _, introduction = title.partition("\n")
    return "\n\n".join([heading, NOTE, introduction.strip(), *rest]) + "\n", pictures


if __name__ == "__main__":
    sys.exit(app.run(main))
