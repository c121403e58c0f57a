"""Pages for people: one self-contained HTML file each, from the templates of this package, in one style."""

from __future__ import annotations

from typing import Any

import jinja2


def render_page(template: str, **values: Any) -> str:
    """A page's HTML. Everything in it is escaped, and a value that the template names but is not given is an error.

    Args:
        template: its path below `mer_r1_jax/evaluation`.
        values: what it shows.
    """
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("mer_r1_jax.evaluation", "."),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render(**values)
