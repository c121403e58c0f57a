"""Pages for people: one self-contained HTML file each, from the templates of this package, in one style."""

from __future__ import annotations

from typing import Any

import jinja2
import markupsafe

from mer_r1_jax.foreign_text import printable


def render_page(template: str, **values: Any) -> str:
    """A page's HTML. All of it is printable and escaped; a value the template names but is not given is an error.

    Args:
        template: its path below `mer_r1_jax/evaluation`.
        values: what it shows.
    """
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("mer_r1_jax.evaluation", "."),
        autoescape=True,
        finalize=_shown,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render(**values)


def _shown(value: Any) -> Any:
    """A value as the page shows it: HTML made here as it is, any other text without what turns or hides it."""
    if isinstance(value, markupsafe.Markup | jinja2.Undefined) or value is None:
        return value
    return printable(value, one_line=False)
