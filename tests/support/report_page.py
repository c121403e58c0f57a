"""A report read as a browser reads it."""

import html.parser
import re
from pathlib import Path

from mer_r1_jax.evaluation import run_report

OURS = (Path(run_report.__file__).parent / "clip_filters.js").read_text()  # the one script a run's report may have


class Page(html.parser.HTMLParser):
    """Tags with their attributes, the visible text, and the scripts."""

    def __init__(self, path):
        super().__init__()
        self.tags, self.text, self.scripts = [], "", []
        self._is_script = False
        self.feed(path.read_text())
        self.text = re.sub(r"\s+", " ", self.text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self._is_script = tag == "script"
        if self._is_script:
            self.scripts.append("")

    def handle_endtag(self, tag):
        self._is_script = False

    def handle_data(self, data):
        if self._is_script:
            self.scripts[-1] += data
        else:
            self.text += data

    def all(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]
