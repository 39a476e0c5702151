"""veerloss.patch, on the installed peers."""

import importlib
import sys

import pytest

import veerloss
from veerloss import patching

INSTALLED = [peer for peer in patching.peers() if patching.status(peer)[0]]


def held_by(package):
    return {
        path: dict(vars(module)) for path, module in sys.modules.items() if path == package or path.startswith(f"{package}.")
    }


@pytest.mark.parametrize("peer", INSTALLED)
def test_replaced_and_restored(peer):
    module = importlib.import_module(f"veerloss.compat.{peer}")
    places = [place.partition(":")[::2] for place in module.REPLACES]
    for path, _ in places:
        importlib.import_module(path)
    before = held_by(module.PEER)
    with veerloss.patch(peer) as names:
        assert {f"{path}.{name}" for path, name in places} <= set(names)
        for (path, name), ours in zip(places, module.REPLACES.values(), strict=True):
            assert getattr(sys.modules[path], name) is getattr(module, ours)
        held = [value for namespace in held_by(module.PEER).values() for value in namespace.values()]
        theirs = [before[path][name] for path, name in places]
        assert not [value for value in held if any(value is original for original in theirs)]
    after = held_by(module.PEER)
    for path, namespace in before.items():
        assert [name for name, value in namespace.items() if after[path][name] is not value] == []
