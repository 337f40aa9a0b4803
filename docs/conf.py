"""Configuration of the documentation site; see https://www.sphinx-doc.org.

A page asks no other host for anything: the script that sets the formulas comes from a package.
"""

import re
import textwrap
from importlib.resources import files

from docutils import nodes
from sphinx.transforms.post_transforms import SphinxPostTransform

import hosm_losses

project = "hosm-losses"
project_copyright = author = "The hosm-losses maintainers"
version = release = hosm_losses.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
]
exclude_patterns = ["_build", "examples"]

html_theme = "furo"
html_title = f"{project} {release}"
html_css_files = ["site.css"]
# MathJax in one file: its SVG output needs no fonts.
mathjax_path = "tex-svg.js"
html_static_path = ["_static", str(files("sphinx-mathjax-offline") / "static/mathjax/tex-svg.js")]

myst_enable_extensions = ["amsmath", "deflist", "dollarmath"]
myst_heading_anchors = 3

# Docstrings name code in single backticks.
default_role = "code"
add_module_names = False
autodoc_member_order = "bysource"
autodoc_preserve_defaults = False  # it reads the source, which does not spell out every argument
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented_params"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True  # a list of the attributes, where each would be a paragraph


def _escape_shapes(app, what, name, obj, options, lines: list[str]) -> None:  # noqa: ANN001, ARG001
    """Keep the star of a shape such as (B, *) from opening an emphasis."""
    lines[:] = [line.replace("*)", r"\*)") for line in lines]


class Tidy(SphinxPostTransform):
    """Write a minus for the hyphen of a number, and keep what belongs to a number on its line.

    Parts of scripts lose the indentation they have there, and the empty lines at their end.
    """

    default_priority = 500
    rules = (
        (re.compile(r"(?<![\w.)])-(?=\.?\d)|(?<=\de)-(?=\d)"), "−"),  # -0.5, 1e-5
        (re.compile(r"(?<=\d)-(?=D\b)"), "\N{NON-BREAKING HYPHEN}"),  # 2-D
        (re.compile(r"(?<=±) | (?=[=<>] [−\d])|(?<=[=<>]) (?=[−\d])|(?<=\d) (?=%)"), "\N{NBSP}"),
    )
    interval = re.compile(r"\([\d.]+ to [\d.]+\)")

    def run(self) -> None:
        """Rewrite the text that is neither code nor mathematics."""
        code = nodes.literal, nodes.math, nodes.FixedTextElement
        for text in list(self.document.findall(nodes.Text)):
            if isinstance(text.parent, code):
                continue
            shown = str(text)
            for pattern, instead in self.rules:
                shown = pattern.sub(instead, shown)
            shown = self.interval.sub(lambda found: found[0].replace(" ", "\N{NBSP}"), shown)
            if shown != text:
                text.parent.replace(text, nodes.Text(shown))
        for block in self.document.findall(nodes.literal_block):
            block.rawsource = textwrap.dedent(block.astext()).rstrip()
            block[:] = [nodes.Text(block.rawsource)]


def setup(app) -> None:  # noqa: ANN001
    """Escape before napoleon, whose priority is 500, writes any markup of its own."""
    app.connect("autodoc-process-docstring", _escape_shapes, priority=400)
    app.add_post_transform(Tidy)
