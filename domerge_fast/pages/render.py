"""Templates to text: what comes from elsewhere is escaped, and drawings are inline."""

from __future__ import annotations

import jinja2
from markupsafe import Markup

from ..errors import printable
from . import svg
from .drawings import Drawing
from .scales import number

__all__ = ["rendered"]


def rendered(template: str, **values: object) -> str:
    """The template of this name, in `templates/`, with these values."""
    return _ENVIRONMENT.get_template(template).render(**values)


def _drawn(drawing: Drawing, label: str) -> Markup:
    return svg.draw(drawing, printable(label))


def _shown(cell: object) -> str:
    """A cell of a table as people read it."""
    if cell is None:
        return "–"
    if isinstance(cell, float):
        return number(cell, aligned=True)
    return printable(str(cell))


_ENVIRONMENT = jinja2.Environment(
    loader=jinja2.PackageLoader("domerge_fast", "pages/templates"),
    autoescape=True,
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
_ENVIRONMENT.filters |= {"drawn": _drawn, "shown": _shown, "printable": printable}
_ENVIRONMENT.tests |= {"numeric": lambda cell: isinstance(cell, (int, float))}
