"""A package imports from lower layers alone, as CONTRIBUTING.md says, and through their faces."""

import ast
import re
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "src" / "hosm_losses"
ROW = re.compile(r"^\| (\d) \| ([^|]+) \|", re.MULTILINE)
# Package by package, the layer that the one table gives it.
LAYERS = {
    package: int(layer)
    for layer, packages in ROW.findall((ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"))
    for package in re.findall(r"`(\w+)`", packages)
}
# Who may import what only some may import.
RESERVED = {"losses": set(), "likelihood": {"diagnostics"}}
# A method that returns an object of a higher layer; the import stands inside it.
EXCEPTION = "score_model.py", "likelihood"


def imports(tree):
    """What a file imports of this package, as paths below it."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            whole = node.module == "hosm_losses"
            names = [f"{node.module}.{each.name}" if whole else node.module for each in node.names]
        else:
            names = [each.name for each in node.names] if isinstance(node, ast.Import) else []
        yield from (name.split(".")[1:] for name in names if name.startswith("hosm_losses."))


def test_the_taylor_engine_imports_pytorch_alone():
    """So that others can take it as it is."""
    for path in (SOURCE / "taylor").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom | ast.Import):
                names = getattr(node, "module", None), *[each.name for each in node.names]
                names = names[:1] if isinstance(node, ast.ImportFrom) else names[1:]
                for name in names:
                    known = name.split(".")[0] in {"torch", *sys.stdlib_module_names}
                    assert known or name.startswith("hosm_losses.taylor"), f"{path}: {name}"


def test_imports_go_to_lower_layers_and_through_their_faces():
    seen = set()
    for path in SOURCE.rglob("*.py"):
        package = path.relative_to(SOURCE).with_suffix("").parts[0]
        if package == "__init__":
            continue
        seen.add(package)
        tree = ast.parse(path.read_text(encoding="utf-8"))
        assert ast.get_docstring(tree), f"{path} does not say what it is"
        for face, *inside in imports(tree):
            if (path.name, face) == EXCEPTION:
                at_top = [node for node in tree.body if isinstance(node, ast.ImportFrom)]
                assert not inside
                assert face not in [each[0] for each in imports(ast.Module(at_top, []))]
            elif face != package:
                told = f"{path} imports from {face}"
                assert LAYERS[face] < LAYERS[package] or LAYERS[package] == LAYERS["_checks"], told
                assert package in RESERVED.get(face, {package}), told
                assert not inside, told
    assert seen == set(LAYERS)
