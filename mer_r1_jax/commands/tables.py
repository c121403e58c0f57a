"""The paper's tables with yours beside its own: mer-r1 tables --folders=[NAME=]FOLDER,... [--out=FILE.md|.json]

Official scores of the nine sets of MER-UniBench, slow and fast F1, and the arms, from folders that evaluate, train,
ablate or lab have written. The paper's rows say that they are the paper's; a cell that no folder gives is a dash; what
was measured on which clips stands in a table of its own, and what was left out is counted and named.

evaluate does not know how its model was trained: mer_r1=OUT says that OUT is an evaluation of the arm mer_r1.
"""

import json
import pathlib

from absl import app, flags

from mer_r1_jax import screen
from mer_r1_jax.cli import explained, show

_FOLDERS = flags.DEFINE_list("folders", [], "folders that are read, each with a name of its row before it if you like")
_OUT = flags.DEFINE_string("out", "", "file of the tables as well: .md, or .json with every number and interval")


def main(argv: list[str]) -> int:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}; settings look like --folders=runs/mine,mer_r1=OUT")
    with explained():
        from mer_r1_jax.evaluation.paper_tables import as_json, as_markdown
        from mer_r1_jax.run.table_sources import TablesError, read_tables
        from mer_r1_jax.storage import atomic_files

        out = pathlib.Path(_OUT.value)
        if _OUT.value and out.suffix not in (".md", ".json"):
            raise TablesError(f"--out: got {_OUT.value}, expected a name that ends in .md or .json; rename it")
        if not _FOLDERS.value:
            raise TablesError(
                "--folders is empty, expected what mer-r1 evaluate, train, ablate or lab has written; "
                "name at least one folder, such as --folders=runs/synthetic"
            )
        tables = read_tables(_FOLDERS.value)
        page = as_markdown(tables)
        show(page.rstrip())
        if _OUT.value:
            with atomic_files.writing("the tables", out):
                out.parent.mkdir(parents=True, exist_ok=True)
                content = json.dumps(as_json(tables), indent=1, ensure_ascii=False, allow_nan=False) + "\n"
                atomic_files.write_text(out, content if out.suffix == ".json" else page)
            screen.say(f"written: {out}")
    return 0
