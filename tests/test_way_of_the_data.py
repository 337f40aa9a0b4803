"""How many files a call enters on the smallest network, and how often it comes back to a room.

Python calls a profile function at every call of a function; its file tells the room. What
everybody may use, the helpers of floor 0, is counted among the files and not among the rooms.
"""

import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import nn

import hosm_losses as hosm

SOURCE = str(Path(hosm.__file__).parent)
# Files, and changes from one room to another: of ode_nll 9 for each of 18 evaluations.
MOST = {"third_order_dsm": (18, 20), "ode_nll": (14, 160)}


def way(call):
    """The files of the package that a call enters, one entry for each function that is called."""
    entered = []

    def watch(frame, event, _):
        name = frame.f_code.co_filename
        if event == "call" and name.startswith(SOURCE):
            entered.append(Path(name).relative_to(SOURCE).with_suffix("").as_posix())

    before = sys.getprofile()
    sys.setprofile(watch)
    try:
        call()
    finally:
        sys.setprofile(before)
    return entered


@pytest.mark.parametrize("function", MOST)
def test_a_call_enters_few_files_and_seldom_comes_back_to_a_room(function):
    layers = nn.Sequential(nn.Linear(3, 8), nn.SiLU(), nn.Linear(8, 3))
    model = hosm.ScoreModel(layers, hosm.VPSchedule(), call=lambda layers, x, t: layers(x))
    x, options = torch.randn(4, 3), {"steps": 8} if function == "ode_nll" else {}
    hosm_function = getattr(hosm, function)
    hosm_function(model, x, **options)  # what is found out once
    entered = way(lambda: hosm_function(model, x, **options))
    rooms = [name.partition("/")[0] for name in entered if not name.startswith("_")]
    changes = sum(one != other for one, other in pairwise(rooms))
    files, most_changes = MOST[function]
    assert len(set(entered)) <= files, sorted(set(entered))
    assert changes <= most_changes, rooms
