"""Equations as MathML. Browsers draw it themselves, so the site needs no script and no network."""

import re
from typing import Any

from docutils import nodes
from latex2mathml.converter import convert
from sphinx.application import Sphinx
from sphinx.errors import ExtensionError

_FAULT = re.compile(r"<mi>&<|linebreak=|\\")
"""What the converter leaves where it does not know a command: it raises nothing."""
_SCROLLS = "overflow-x: auto; overflow-y: hidden; padding-block: 0.4em"  # on a narrow screen


def mathml(latex: str, display: str = "inline") -> str:
    """Return the equation as MathML.

    Raises:
        ExtensionError: a command is not known, so that browsers would show it as it is written.
    """
    found = convert(latex.replace("{aligned}", "{align*}"), display=display)
    if _FAULT.search(found):
        raise ExtensionError(f"an equation cannot be drawn as MathML; write it without what is not known: {latex}")
    return re.sub(r'columnalign="(left|right)"', r'style="text-align: \1"', found)  # MathML Core has it from CSS


def _inline(self: Any, node: nodes.math) -> None:
    self.body.append(mathml(node.astext()))
    raise nodes.SkipNode


def _block(self: Any, node: nodes.math_block) -> None:
    self.body.append(
        self.starttag(node, "div", style=_SCROLLS, tabindex="0") + mathml(node.astext(), "block") + "</div>\n"
    )
    raise nodes.SkipNode


def setup(app: Sphinx) -> dict[str, bool]:
    """Register the renderer; Sphinx calls this."""
    app.add_html_math_renderer("mathml", inline_renderers=(_inline, None), block_renderers=(_block, None))
    return {"parallel_read_safe": True, "parallel_write_safe": True}
