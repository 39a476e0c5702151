"""The constants that C++ and Python both have are the same."""

import torch

from veerloss import _layout


def test_layout_constants_are_those_of_the_compiled_library():
    compiled = torch.ops.veerloss.layout_constants(like=torch.empty(0))
    assert compiled.tolist() == list(map(float, _layout.CONSTANTS))
