"""HTML pages, one file each, that need no network: templates of jinja2."""

from pathlib import Path
from typing import Any

import jinja2

from sae_jax.evals import format_value


def render(template: str, **values: Any) -> str:
    """The page of a template in this folder; text in `values` is escaped."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals["zip"] = zip
    environment.filters["value"] = format_value
    environment.filters["cell"] = _format_cell
    environment.filters["visible"] = _show_whitespace
    return environment.get_template(template).render(values)


def _format_cell(cell: str | int | float) -> str:
    return cell if isinstance(cell, str) else format_value(cell)


def _show_whitespace(token: str) -> str:
    """A token on one line: line ends become a sign, tabs an arrow."""
    return token.replace("\r", "␍").replace("\n", "↵").replace("\t", "⇥")
