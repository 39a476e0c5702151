"""The losses of an installed peer replaced in place, for code whose imports cannot be changed."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import logging
import pkgutil
import re
import sys
import threading
from collections.abc import Iterator
from types import ModuleType, TracebackType

from . import compat

logger = logging.getLogger("veerloss")


class Patch(list):
    """The names that ``patch`` replaced, "module.name". As a context manager it restores them at the end, or leaves that to
    the last of those, of any thread, that patched the same peer; and to ``unpatch``, if one is no context manager."""

    def __init__(self, names: list[str], peer: _Peer) -> None:
        super().__init__(names)
        self._peer, self._hold = peer, object()
        peer.holds.add(self._hold)

    def __enter__(self) -> Patch:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        with _lock:
            self._peer.holds.discard(self._hold)
            if not self._peer.holds and _patched.get(self._peer.key) is self._peer:
                _restore(self._peer.key)


class _Peer:
    """One that is patched now."""

    def __init__(
        self, key: str, pairs: list[tuple[object, object]], methods: list[tuple[type, str, object]], registry: str | None
    ) -> None:
        self.key = key
        self.pairs = pairs  # (its loss, ours)
        self.methods = methods  # (class, name, ours), of models that call our losses while they are trained
        self.originals = [(owner, name, vars(owner)[name]) for owner, name, _ in methods]
        self.registry = registry
        self.holds: set[object] = set()  # one of each Patch that is not at its end
        ours = [new for _, new in pairs]  # which code may have had before
        self.kept = {
            f"{path}.{n}" for path, held in self.namespaces() for n, v in list(held.items()) if any(v is o for o in ours)
        }

    def namespaces(self) -> Iterator[tuple[str, dict[str, object]]]:
        """Of its loaded modules, and of its registry; each with its own name."""
        package = self.key.partition(".")[0]
        for path, module in sorted(sys.modules.items()):
            if path == package or path.startswith(f"{package}."):
                yield path, getattr(module, "__dict__", {})
        if self.registry is not None:
            path, _, name = self.registry.partition(":")
            registry = getattr(sys.modules.get(path), name, None)
            if registry is not None:
                yield f"{path}.{name}", registry.module_dict

    def swap(self, pairs: list[tuple[object, object]]) -> list[str]:
        """Puts the second of each pair wherever there is the first, but where ours were before."""
        changed = []
        for path, held in self.namespaces():
            for name, value in list(held.items()):
                new = next((new for old, new in pairs if value is old), None)
                if new is not None and f"{path}.{name}" not in self.kept:
                    held[name] = new
                    changed.append(f"{path}.{name}")
        return changed

    @staticmethod
    def set_methods(methods: list[tuple[type, str, object]]) -> list[str]:
        changed = [(owner, name, new) for owner, name, new in methods if vars(owner)[name] is not new]
        for owner, name, new in changed:
            setattr(owner, name, new)
        return [f"{owner.__module__}.{owner.__qualname__}.{name}" for owner, name, _ in changed]


_patched: dict[str, _Peer] = {}
_lock = threading.RLock()


def peers() -> list[str]:
    """Those that ``patch`` knows."""
    return [module.name for module in pkgutil.iter_modules(compat.__path__) if not module.name.startswith("_")]


def patch(peer: str, *, at: str | None = None) -> Patch:
    """Replaces the losses of an installed peer by those of ``veerloss.compat.<peer>``, in place.

    Of transformers also the loss of a model that upsamples its logits for it alone: docs/low-resolution-logits.md.

    They are replaced in every module of the peer that holds them, and in the registry from which it builds losses by name.
    Modules of the peer that are imported later get the new ones too. What other code has imported before, ``from peer import
    loss``, and objects that it has made, stay as they are: patch first. Patching twice is patching once: one ``unpatch``
    undoes it.

    Args:
        peer: a module of ``veerloss.compat``, such as "kornia", "monai" or "segmentation_models_pytorch".
        at: where the peer is, if not under its own name: "project.utils.lovasz_losses" for a project's copy of Berman's file,
            which is then replaced in all modules of ``project``.

    Returns:
        The names that were replaced, also logged (logger "veerloss", level INFO); a context manager that restores them.

    Raises:
        ValueError: an unknown peer.
        ModuleNotFoundError: the peer is not installed.
        RuntimeError: its version is not one that veerloss knows, or it has none of the losses.

    Example:
        >>> with patch("torchvision"):  # doctest: +SKIP
        ...     train()
    """
    module = _module(peer)
    if at is not None and not isinstance(at, str):
        raise TypeError(f"at must be the name of a module or None, got {type(at).__name__}")
    reason = _not_patchable(module, at)
    if reason is not None:
        raise reason
    key = module.PEER if at is None else at
    with _lock:
        found = _patched.get(key)
        if found is None:
            of_peer = ([], None) if at else (_methods(module), getattr(module, "REGISTRY", None))
            found = _Peer(key, _pairs(module, at), *of_peer)
        if not found.pairs:
            raise RuntimeError(f"peer {peer!r} has none of {sorted(module.REPLACES)}: another version than its metadata says?")
        _patched[key] = found
        replaced = Patch(found.swap(found.pairs) + found.set_methods(found.methods), found)
    logger.info("veerloss: patched %s: %s", key, ", ".join(replaced) or "nothing new")
    return replaced


def unpatch(peer: str, *, at: str | None = None) -> list[str]:
    """Undoes ``patch``. Returns the names that it restored.

    Raises:
        ValueError: an unknown peer.
        RuntimeError: the peer is not patched.
    """
    module = _module(peer)
    key = module.PEER if at is None else at
    with _lock:
        if key not in _patched:
            raise RuntimeError(f"peer {peer if at is None else at!r} is not patched")
        return _restore(key)


def status(peer: str) -> tuple[str | None, str | None]:
    """(version or None if it is not installed, why it cannot be patched or None)."""
    module = _module(peer)
    reason = _not_patchable(module, None)
    return _version(module), None if reason is None else str(reason)


def _module(peer: str) -> ModuleType:
    if peer not in peers():
        raise ValueError(f"peer must be one of {peers()}, got {peer!r}")
    return importlib.import_module(f".compat.{peer}", __package__)


def _version(module: ModuleType) -> str | None:
    """Of the peer; "" for one that has none."""
    if module.DISTRIBUTION is None:
        return "" if _exists(module.PEER) else None
    try:
        return importlib.metadata.version(module.DISTRIBUTION)
    except importlib.metadata.PackageNotFoundError:
        return None


def _exists(name: str) -> bool:
    if name in sys.modules:
        return True
    try:
        return importlib.util.find_spec(name) is not None
    except (ImportError, ValueError):  # of a package that does not exist, or is no package
        return False


def _not_patchable(module: ModuleType, at: str | None) -> Exception | None:
    peer = module.__name__.rpartition(".")[2]
    if not module.REPLACES:
        return RuntimeError(f"peer {peer!r} has no loss of its own to replace: import veerloss.compat.{peer} instead")
    if at is not None:
        return None if _exists(at) else ModuleNotFoundError(f"at must be a module that can be imported, got {at!r}")
    version = _version(module)
    if version is None:
        install = "" if module.DISTRIBUTION is None else f" (pip install {module.DISTRIBUTION})"
        return ModuleNotFoundError(f"peer {peer!r} is not installed{install}")
    if module.VERSIONS is not None and not _within(version, module.VERSIONS):
        return RuntimeError(f"peer {peer!r} is of version {version}; veerloss knows {module.VERSIONS}")
    return None


def _within(version: str, versions: str) -> bool:
    """Whether a version is within bounds like ">=0.6,<0.10", by its release numbers."""

    def numbers(text: str) -> list[int]:
        release = re.match(r"\d+(\.\d+)*", text)
        found = [int(n) for n in release[0].split(".")] if release else []
        return found + [0] * (6 - len(found))

    checks = {">=": lambda a, b: a >= b, "<=": lambda a, b: a <= b, "<": lambda a, b: a < b, "==": lambda a, b: a == b}
    bounds = re.findall(r"(>=|<=|<|==)\s*([\d.]+)", versions)
    return all(checks[sign](numbers(version), numbers(bound)) for sign, bound in bounds)


def _pairs(module: ModuleType, at: str | None) -> list[tuple[object, object]]:
    """(the peer's, ours) for each loss that the peer has."""
    pairs = []
    for place, name in module.REPLACES.items():
        path, _, original = place.partition(":")
        try:
            found = getattr(importlib.import_module(path if at is None else at), original, None)
        except ModuleNotFoundError as error:
            if not path.startswith(error.name or "?"):
                raise  # something that the peer needs
            continue
        ours = getattr(module, name)
        if found is not None and found is not ours:
            pairs.append((found, ours))
    return pairs


def _methods(module: ModuleType) -> list[tuple[type, str, object]]:
    """(class, name, ours) for each method that the peer has, where the module of the class can be imported here."""
    found = []
    for place, make in getattr(module, "METHODS", {}).items():
        path, _, qualified = place.partition(":")
        owner, _, name = qualified.rpartition(".")
        try:
            owner = getattr(importlib.import_module(path), owner, None)
        except Exception as error:  # models need more than losses do
            logger.info("veerloss: %s cannot be imported, and stays as it is: %s", path, error)
            continue
        if owner is not None and name in vars(owner):
            found.append((owner, name, getattr(module, make)(vars(owner)[name])))
    return found


def _restore(key: str) -> list[str]:
    peer = _patched.pop(key)
    names = peer.swap([(ours, original) for original, ours in peer.pairs]) + peer.set_methods(peer.originals)
    logger.info("veerloss: restored %s: %s", key, ", ".join(names))
    return names
