"""A source file imports only from lower floors, and differentiation has its rooms."""

import ast
import importlib
from pathlib import Path

import pytest

FLOORS = (
    {"torch_internals"},
    {"_checks"},
    {
        "adaptive",
        "conditions",
        "multistep",
        "primitives",
        "probes",
        "progress",
        "remedies",
        "residuals",
        "student",
    },
    {
        "inference",
        "primitive_mode",
        "snapshot",
        "taylor/forward_mode",
        "taylor/recompute",
        "taylor/table",
        "wrappers",
    },
    {"backward", "chunks", "taylor/jet"},
    {
        "taylor/casts",
        "taylor/indices",
        "taylor/joins",
        "taylor/layers",
        "taylor/pointwise",
        "taylor/properties",
        "taylor/shapes",
    },
    {"taylor/arithmetic"},
    {"taylor/attention", "taylor/norm_formulas"},
    {"taylor/norm_gradients"},
    {"taylor/norms"},
    {"taylor/__init__"},
    {"checkpointing", "engines"},
    {"derivatives"},
    {"differences", "schedule"},
    {
        "coordinates",
        "discrete_schedule",
        "kinks",
        "module_fields",
        "noise_field",
        "schedule_check",
        "schedules",
    },
    {"score_model", "value_check"},
    {"batch_check", "divergence", "interop/_table", "nll_result", "weighting"},
    {
        "derivative_check",
        "images",
        "interop/denoising_diffusion",
        "interop/diffusers",
        "interop/edm",
        "interop/guided_diffusion",
        "interop/score_sde",
        "likelihood_inputs",
        "loss_inputs",
        "loss_options",
        "ode_paths",
    },
    {"bound", "interop/__init__", "likelihood", "terms"},
    {"objective"},
    {"loss_modules", "losses"},
    {"__init__"},
)
SIDES = (
    {
        "chunks",
        "loss_inputs",
        "loss_modules",
        "loss_options",
        "losses",
        "objective",
        "residuals",
        "terms",
        "weighting",
    },
    {
        "adaptive",
        "bound",
        "coordinates",
        "divergence",
        "images",
        "likelihood",
        "likelihood_inputs",
        "multistep",
        "nll_result",
        "ode_paths",
        "student",
    },
)
PACKAGES = {"interop", "taylor"}
# Where PyTorch's differentiation is called.
DIFFERENTIATES = {"backward", "chunks", "derivatives", "engines", "torch_internals"}
DIFFERENTIATES |= {"taylor/forward_mode", "taylor/layers", "taylor/recompute"}
LONGEST = 320
FLOOR = {name: number for number, names in enumerate(FLOORS) for name in names}
SOURCE = Path(__file__).parent.parent / "src" / "hosm_losses"
FILES = {
    path.relative_to(SOURCE).with_suffix("").as_posix(): path
    for path in sorted(SOURCE.rglob("*.py"))
}
MODULES = [name for name in FILES if not name.endswith("__init__")]


def _imported(tree):
    """Dotted names of everything the file imports, with what it takes from each module."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "write imports in full"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _own_imports(name):
    tree = ast.parse(FILES[name].read_text(encoding="utf-8"))
    dotted = [found.split(".") for found in _imported(tree)]
    own = [(*parts[1:], "__init__") for parts in dotted if parts[0] == "hosm_losses"]
    names = {"/".join(parts[:2]) if parts[0] in PACKAGES else parts[0] for parts in own}
    return {name if name in FILES else f"{name.split('/')[0]}/__init__" for name in names}


def _differentiates(tree):
    """Whether torch.func, torch.autograd or .backward() occurs outside strings."""
    dotted = {ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    dotted |= set(_imported(tree))
    return any(
        f"{text}.".startswith(("torch.func.", "torch.autograd.")) for text in dotted
    ) or any(text.endswith(".backward") for text in dotted)


def test_every_file_has_a_floor():
    assert set(FILES) == set(FLOOR)


@pytest.mark.parametrize("name", FILES)
def test_imports_go_down(name):
    below = set().union(*FLOORS[: FLOOR[name]])
    assert _own_imports(name) - below == set()


@pytest.mark.parametrize("side", SIDES, ids=["losses", "likelihood"])
def test_a_side_is_imported_by_itself_alone(side):
    others = set(FILES) - side - {"__init__"}
    assert {name for name in others if _own_imports(name) & side} == set()


def test_differentiation_has_its_rooms():
    trees = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in FILES.items()}
    assert {name for name, tree in trees.items() if _differentiates(tree)} == DIFFERENTIATES


@pytest.mark.parametrize("name", FILES)
def test_files_are_short(name):
    assert len(FILES[name].read_text(encoding="utf-8").splitlines()) <= LONGEST


@pytest.mark.parametrize("name", MODULES)
def test_modules_say_what_they_are_and_what_they_offer(name):
    module = importlib.import_module(f"hosm_losses.{name.replace('/', '.')}")
    assert module.__doc__
    # A file of rules registers them and offers nothing else.
    assert module.__all__ or name.startswith("taylor/")
    assert {public for public in module.__all__ if not hasattr(module, public)} == set()
