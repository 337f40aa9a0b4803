"""Student's factor against the distribution function of Student's law."""

import mpmath
import pytest

from hosm_losses.likelihood.student import student_factor


@pytest.mark.parametrize("freedom", [3, 4, 7, 15, 63])
def test_widened_twice_the_error_covers_what_the_normal_law_says(freedom):
    def density(t):
        return (1 + t**2 / freedom) ** (-(freedom + 1) / 2)

    end = 2 * student_factor(freedom)
    inside, all_of_it = (mpmath.quad(density, [0, 1, bound]) for bound in (end, mpmath.inf))
    assert float(inside / all_of_it) == pytest.approx(float(mpmath.erf(mpmath.sqrt(2))), abs=2e-4)
