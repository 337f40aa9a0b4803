"""Every planted fault can be planted."""

import ast

import pytest

from tests.mutants import MUTANTS, PACKAGE, ROOT, Mutant, plant


def test_every_mutant_can_be_planted():
    for mutant in MUTANTS:
        source = (PACKAGE / mutant.file).read_text(encoding="utf-8")
        assert ast.dump(ast.parse(plant(mutant, source))) != ast.dump(ast.parse(source)), mutant
        assert all((ROOT / test).is_file() for test in mutant.tests.split()), mutant


def test_a_fault_that_is_not_found_once_is_an_error():
    source = "def f(x):\n    with x:\n        y = x; y = x\n    return y\n"
    for old, count in (("y = x", 2), ("y = z", 0)):
        with pytest.raises(ValueError, match=f"once; got {count}"):
            plant(Mutant("file.py", "", "f", old, "pass"), source)
    faults = [("f#2", "y = x", "pass"), ("f", "with x:", "if x:"), ("text", "return y", "return")]
    planted = [plant(Mutant("file.py", "", *fault), source) for fault in faults]
    assert planted[0].count("y = x") == 1
    assert "if x:" in planted[1]
    assert "return y" not in planted[2]
