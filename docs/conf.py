"""Configuration of the documentation site; see https://www.sphinx-doc.org."""

import hosm_losses

project = "hosm-losses"
author = "The hosm-losses maintainers"
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


def _escape_shapes(app, what, name, obj, options, lines: list[str]) -> None:  # noqa: ANN001, ARG001
    """Keep the star of a shape such as (B, *) from opening an emphasis."""
    lines[:] = [line.replace("*)", r"\*)") for line in lines]


def setup(app) -> None:  # noqa: ANN001
    """Escape before napoleon, whose priority is 500, writes any markup of its own."""
    app.connect("autodoc-process-docstring", _escape_shapes, priority=400)
