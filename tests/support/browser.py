"""A page opened in headless Chromium and acted upon as a person would, by a script in a page around it."""

import html
import json
import re
import shutil
import subprocess

import pytest

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium here to open pages in")
_AROUND = """<!doctype html><meta charset="utf-8"><iframe id="page" width="{width}" height="900" src="{name}"></iframe>
<pre id="result"></pre><script>
const frame = document.getElementById("page");
frame.addEventListener("load", async () => {{
  const page = frame.contentDocument, said = document.getElementById("result");
  try {{ said.textContent = JSON.stringify(await (async () => {{ {script} }})()); }}
  catch (error) {{ said.textContent = JSON.stringify({{error: String(error)}}); }}
}});
</script>"""


def in_chromium(path, script, width=1280):
    """What a script makes of a page.

    Args:
        path: the page's file; another is written beside it.
        script: body of an async JavaScript function, with `page` the page's document; it returns a JSON value.
        width: of the page in CSS pixels.
    """
    around = path.with_name("around.html")
    around.write_text(_AROUND.format(width=width, name=path.name, script=script), encoding="utf-8")
    words = [CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files"]
    words += [f"--user-data-dir={path.parent / 'chromium'}", "--virtual-time-budget=8000", "--dump-dom"]
    ended = subprocess.run([*words, around.absolute().as_uri()], capture_output=True, text=True, timeout=120)
    found = re.search(r'<pre id="result">(.*?)</pre>', ended.stdout, re.DOTALL)
    assert found and found[1], ended.stderr
    return json.loads(html.unescape(found[1]))
