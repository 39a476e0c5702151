"""Names, order, kinds and defaults of the arguments are those of the installed peers."""

import importlib
import inspect

import pytest
import torch

from veerloss import patching

INSTALLED = [peer for peer in patching.peers() if patching.status(peer)[0]]
CASES = [
    (peer, place, name)
    for peer in INSTALLED
    for place, name in importlib.import_module(f"veerloss.compat.{peer}").REPLACES.items()
]


def parameters(function):
    """Without annotations; defaults as they print, for enumerations of the peer are strings here."""
    return [(p.name, p.kind, str(p.default)) for p in inspect.signature(function).parameters.values()]


@pytest.mark.parametrize(("peer", "place", "name"), CASES, ids=[f"{peer} {name}" for peer, _, name in CASES])
def test_signature(peer, place, name):
    path, _, original = place.partition(":")
    ours, theirs = (
        getattr(importlib.import_module(f"veerloss.compat.{peer}"), name),
        getattr(importlib.import_module(path), original),
    )
    if isinstance(theirs, torch.jit.ScriptFunction):  # which has none; it is made of the function without "_jit"
        theirs = getattr(importlib.import_module(path), original.removesuffix("_jit"))
    assert parameters(ours) == parameters(theirs)
    if inspect.isclass(theirs):
        assert parameters(ours.forward) == parameters(theirs.forward)
