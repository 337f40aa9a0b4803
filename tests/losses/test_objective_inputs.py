"""Times that are taken: both ends of a schedule, and float32 for data in half precision."""

import pytest
import torch

import hosm_losses as hosm

VP = hosm.VPSchedule()
TABLE = hosm.DiscreteSchedule([0.9, 0.5, 0.1])
T = torch.full((4,), 0.5, dtype=torch.float64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("schedule", [VP, TABLE, hosm.CosineSchedule(), hosm.EDMSchedule()])
def test_both_ends_of_the_schedule_are_inside_it(schedule, dtype):
    ends = torch.tensor([schedule.t_min, schedule.t_max], dtype=dtype)
    own = hosm.ScoreModel(lambda x, t: x, schedule)
    hosm.first_order_dsm(own, torch.ones(2, 2, dtype=dtype), t=ends)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_data_takes_float32_times(dtype):
    own = hosm.ScoreModel(lambda x, t: x, VP)
    x0 = torch.randn(4, 2, dtype=dtype)
    terms = hosm.dsm_terms(own, x0, t=T.float(), noise=x0, probe=x0)
    assert all(term.dtype == torch.float32 for term in terms)
    hosm.third_order_dsm(own, x0)
