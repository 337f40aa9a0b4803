"""Every planted fault can be planted."""

from tests.mutants import MUTANTS, PACKAGE, ROOT


def test_every_mutant_can_be_planted():
    for mutant in MUTANTS:
        source = (PACKAGE / mutant.file).read_text(encoding="utf-8")
        assert source.count(mutant.old) == 1, mutant
        assert mutant.new != mutant.old, mutant
        assert all((ROOT / test).is_file() for test in mutant.tests.split()), mutant
