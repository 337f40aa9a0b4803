"""Configuration of the documentation site; see https://www.sphinx-doc.org.

Pages load nothing from other hosts: the script that renders formulas comes from a package.
"""

import inspect
import re
import sys
import textwrap
import zlib
from importlib.resources import files
from pathlib import Path
from typing import get_type_hints

import matplotlib.style
from docutils import nodes
from sphinx.pycode import ModuleAnalyzer
from sphinx.transforms import SphinxTransform
from sphinx.transforms.post_transforms import SphinxPostTransform

import hosm_losses

sys.path.insert(0, str(Path(__file__).parent))

import pictures

project = "hosm-losses"
project_copyright = author = "The hosm-losses maintainers"
version = release = hosm_losses.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.intersphinx",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
    "sphinx_gallery.gen_gallery",
]
exclude_patterns = ["_build", "_templates", "examples", "tutorials"]
templates_path = ["_templates"]

html_theme = "furo"
html_title = f"{project} {release}"
html_css_files = ["site.css"]
html_js_files = [("site.js", {"defer": "defer"})]
# MathJax in one file: its SVG output needs no fonts.
mathjax_path = "tex-svg.js"
html_favicon = "_static/favicon.svg"
html_static_path = ["_static", str(files("sphinx-mathjax-offline") / "static/mathjax/tex-svg.js")]

myst_enable_extensions = ["amsmath", "deflist", "dollarmath"]
myst_heading_anchors = 3

# The named unions, and the modules in which they are documented.
TYPES = {
    "Divergence": "likelihood.divergence",
    "Prediction": "model.score_model",
    "Probes": "losses.options",
    "Targets": "losses.targets",
    "TermWeights": "losses.options",
    "TimeSampler": "losses.weighting",
    "Weighting": "losses.weighting",
}
# A type is shown, and linked, by the name that a user imports.
aliases = {name: type(name, (), {"__module__": "hosm_losses"}) for name in TYPES}
sources = {}  # where classes are defined, for links to the source
for public in vars(hosm_losses).values():
    call = public
    if isinstance(public, type):
        sources[public.__name__] = public.__module__
        public.__module__, call = "hosm_losses", public.__init__
    if inspect.isfunction(call):
        call.__annotations__ = get_type_hints(call, localns=aliases)

# Docstrings name code in single backticks.
default_role = "code"
add_module_names = False
autodoc_member_order = "bysource"
autodoc_preserve_defaults = False  # it reads the source, which does not spell out every argument
autodoc_typehints = "description"
autodoc_typehints_format = "short"
autodoc_typehints_description_target = "documented_params"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True  # one list of attributes instead of paragraphs
# Methods on the page of a class; "" means all. In templates, autosummary defines "members" itself.
autosummary_context = {
    "documented": {
        "ScoreModel": "forward, noise, score, denoise, coefficients, native_weight, time_in",
        "OnSubspace": "reduce, expand, project, forward",
        "DivergenceEstimator": "products, is_random, draw, estimate",
        "Solver": "integrate",
        "AdaptiveTimes": "learn, density",
        "ODEDistribution": "log_prob, sample, rsample, rsample_and_log_prob, expand",
        "TargetScores": "information_of",
        "NLLResult": "bits_per_dim, summary, failures, cat, to_dict, from_dict",
        "SampleResult": "bits_per_dim, summary, failures, cat, to_dict, from_dict",
    }
    | dict.fromkeys(("PosteriorCovariance", "WrappingReport", "Weights"), "")
    | dict.fromkeys(("FirstOrderDSM", "SecondOrderDSM", "ThirdOrderDSM"), "forward")
    | dict.fromkeys([name for name in vars(hosm_losses) if name.endswith("Schedule")], "")
}

# A build uses no network, so the linked names of other projects are listed here.
TORCH, PYTHON = "docs.pytorch.org/docs/stable", "docs.python.org/3/library"
LINKED = {
    "torch.Tensor": f"{TORCH}/tensors.html#torch.Tensor",
    "torch.Generator": f"{TORCH}/generated/torch.Generator.html",
    "torch._C.Generator": f"{TORCH}/generated/torch.Generator.html",
    "torch.nn.Module": f"{TORCH}/generated/torch.nn.Module.html",
    "torch.nn.modules.module.Module": f"{TORCH}/generated/torch.nn.Module.html",
    "torch.distributions.distribution.Distribution": f"{TORCH}/distributions.html",
    "torch.distributed.distributed_c10d.ProcessGroup": f"{TORCH}/distributed.html",
    "numpy.ndarray": "numpy.org/doc/stable/reference/generated/numpy.ndarray.html",
    "collections.abc.Callable": f"{PYTHON}/collections.abc.html#collections.abc.Callable",
    "collections.abc.Mapping": f"{PYTHON}/collections.abc.html#collections.abc.Mapping",
    "collections.abc.Sequence": f"{PYTHON}/collections.abc.html#collections.abc.Sequence",
}
inventory = Path(__file__).parent / "_build" / "linked.inv"
inventory.parent.mkdir(exist_ok=True)
lines = "".join(f"{name} py:class 1 {page} -\n" for name, page in LINKED.items())
inventory.write_bytes(
    b"# Sphinx inventory version 2\n# Project: PyTorch, Python, NumPy\n# Version: \n"
    b"# The remainder of this file is compressed using zlib.\n" + zlib.compress(lines.encode())
)
intersphinx_mapping = {"linked": ("https://", str(inventory))}
# Named tuples without a page; their fields are described where they are returned.
nitpick_ignore = [
    ("py:class", "hosm_losses.likelihood.result.Quantization"),
    ("py:class", "hosm_losses.likelihood.weights.Expectation"),
    ("py:class", "hosm_losses.likelihood.weights.Sandwich"),
    ("py:class", "torch.optim.optimizer.Optimizer"),  # documented as torch.optim.Optimizer
]

# The tutorials set no style, so a downloaded tutorial uses matplotlib's default.
matplotlib.style.use(pictures.STYLE)
copybutton_exclude = ".linenos, .gp, .go"
sphinx_gallery_conf = {
    "examples_dirs": "tutorials",
    "gallery_dirs": "gallery",
    "filename_pattern": r"/(?!molecule)\w+\.py$",  # that one takes a quarter of an hour
    "download_all_examples": False,
    "show_signature": False,
    "backreferences_dir": None,
    "image_scrapers": ("pictures.scrape",),
    "capture_repr": (),  # else a script that ends with a title shows Text(0.5, …)
    "within_subsection_order": "FileNameSortKey",
    "reset_modules": (),  # it would reset the style
    "write_computation_times": False,  # that page loads a script from another host
}


def _tidy_docstring(app, what, name, obj, options, lines: list[str]) -> None:  # noqa: ANN001, ARG001
    """Insert the docstring of a union, and escape the star of (B, *), which opens an emphasis."""
    if (alias := name.removeprefix("hosm_losses.")) in TYPES:
        module = ModuleAnalyzer.for_module(f"hosm_losses.{TYPES[alias]}")
        lines[:] = module.find_attr_docs()["", alias]
    lines[:] = [line.replace("*)", r"\*)") for line in lines]


class BothVersions(SphinxTransform):
    """Put the dark version of a picture beside the light version; furo shows one of the two."""

    default_priority = 500

    def apply(self, **_: object) -> None:
        """Add the dark version of every image that has one."""
        for light in list(self.document.findall(nodes.image)):
            file = Path(self.env.relfn2path(light["uri"], self.env.docname)[1])
            if pictures.dark(file).exists():
                dark = light.deepcopy()
                dark["uri"] = light["uri"].replace(file.name, pictures.dark(file).name)
                light["classes"].append("only-light")
                dark["classes"].append("only-dark")
                light.parent.insert(light.parent.index(light) + 1, dark)


class Tidy(SphinxPostTransform):
    """Turn the hyphen of a number into a minus sign, and keep numbers and units on one line.

    Parts of scripts lose their indentation and their trailing empty lines.
    """

    default_priority = 500
    rules = (
        (re.compile(r"(?<![\w.)])-(?=\.?\d)|(?<=\de)-(?=\d)"), "−"),  # -0.5, 1e-5
        (re.compile(r"(?<=\d)-(?=D\b)"), "\N{NON-BREAKING HYPHEN}"),  # 2-D
        (re.compile(r"(?<=±) | (?=[=<>] [−\d])|(?<=[=<>]) (?=[−\d])|(?<=\d) (?=%)"), "\N{NBSP}"),
    )

    def run(self) -> None:
        """Rewrite the text that is neither code nor mathematics."""
        code = nodes.literal, nodes.math, nodes.FixedTextElement
        for text in list(self.document.findall(nodes.Text)):
            if isinstance(text.parent, code) or "default_value" in text.parent.get("classes", ()):
                continue
            shown = str(text)
            for pattern, instead in self.rules:
                shown = pattern.sub(instead, shown)
            if shown != text:
                text.parent.replace(text, nodes.Text(shown))
        for block in self.document.findall(nodes.literal_block):
            block.rawsource = textwrap.dedent(block.astext()).rstrip()
            block[:] = [nodes.Text(block.rawsource)]


def setup(app) -> None:  # noqa: ANN001
    """Tidy docstrings before napoleon, whose priority is 500, adds its own markup."""
    app.connect("autodoc-process-docstring", _tidy_docstring, priority=400)
    app.connect("viewcode-follow-imported", lambda _, __, name: sources.get(name.split(".")[0]))
    app.add_transform(BothVersions)
    app.add_post_transform(Tidy)
