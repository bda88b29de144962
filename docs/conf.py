"""Settings of the site. ``make docs`` builds it, and fails on a missing docstring, a broken link or bad markup."""

import os
import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent / "src")]
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # importing a framework must not ask the network

from subspan import __version__  # noqa: E402

project = "subspan"
author = "The subspan authors"
copyright = "The subspan authors, Apache-2.0"
version = release = __version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.doctest",
    "ext.mathml",
    "ext.docstrings",
    "ext.signatures",
    "ext.links",
]
html_math_renderer = "mathml"
exclude_patterns = ["_build", "ext"]
html_theme = "furo"
html_title = f"subspan {version}"
html_copy_source = False

myst_enable_extensions = ["amsmath", "colon_fence", "dollarmath"]
myst_heading_anchors = 4  # links to headings, as repositories show them
myst_dmath_double_inline = True

add_module_names = False
highlight_language = "none"  # what stands apart in a docstring is an equation, unless it is an example
autodoc_member_order = "bysource"
autodoc_default_options = {"members": True, "show-inheritance": True}
autodoc_typehints = "signature"
napoleon_numpy_docstring = False
napoleon_use_rtype = False

# Nothing can be looked up of other projects without a network.
nitpicky = True
nitpick_ignore_regex = [
    ("py:.*", r"(abc|accelerate|lightning|torch|collections|concurrent|pathlib|types)(\..*)?"),  # other people's
    ("py:exc", r"LinAlgError"),  # torch's, under its short name
    ("py:class", r"(.*\.)?_\w+(\..*)?"),  # private bases
    # What public classes are made of, and show of their inside.
    ("py:class", r"subspan\.(state_dict\.Restorable|step\.(in_backward\.Stepper|layout\.Layout|work\.Slot))"),
    ("py:class", r"subspan\.backward\.(projection\.Projection|layer\.BackwardLinear)"),
    ("py:class", r"subspan\.checkpoints\.shard_files\.Written"),
]
