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
from types import ModuleType, TracebackType

from . import compat

logger = logging.getLogger("veerloss")

#: Of the peers that are patched now: what stands in whose place.
_patched: dict[str, list[tuple[object, object]]] = {}
_lock = threading.RLock()


class Patch(list):
    """The names that :func:`patch` replaced, "module.name". As a context manager it restores them at the end, unless the peer
    was patched already when it was made."""

    def __init__(self, names: list[str], key: str, outermost: bool) -> None:
        super().__init__(names)
        self._key, self._outermost = key, outermost

    def __enter__(self) -> Patch:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        if self._outermost:
            _restore(self._key)


def peers() -> list[str]:
    """Those that :func:`patch` knows."""
    return [module.name for module in pkgutil.iter_modules(compat.__path__) if not module.name.startswith("_")]


def patch(peer: str, *, at: str | None = None) -> Patch:
    """Replaces the losses of an installed peer by those of ``veerloss.compat.<peer>``, in every module of it that holds them.

    Modules of the peer that are imported later get the new ones too. What other code has imported before, ``from peer import
    loss``, and objects that it has made, stay as they are: patch first. Patching twice is patching once.

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
        outermost = key not in _patched
        pairs = _patched[key] if not outermost else _pairs(module, at)
        if not pairs:
            raise RuntimeError(f"peer {peer!r} has none of {sorted(module.REPLACES)}: another version than its metadata says?")
        _patched[key] = pairs
        names = _swap(key, pairs)
    logger.info("veerloss: patched %s: %s", key, ", ".join(names) or "nothing new")
    return Patch(names, key, outermost)


def unpatch(peer: str, *, at: str | None = None) -> list[str]:
    """Undoes :func:`patch`. Returns the names that it restored.

    Raises:
        ValueError: an unknown peer.
        RuntimeError: the peer is not patched.
    """
    module = _module(peer)
    key = module.PEER if at is None else at
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
    bounds = [re.fullmatch(r"\s*(>=|<=|<|==)\s*([\d.]+)\s*", bound) for bound in versions.split(",")]
    return all(checks[bound[1]](numbers(version), numbers(bound[2])) for bound in bounds)


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


def _swap(key: str, pairs: list[tuple[object, object]]) -> list[str]:
    """Puts the second of each pair wherever a loaded module of the peer has the first."""
    package, changed = key.partition(".")[0], []
    for path, module in sorted(sys.modules.items()):
        if module is None or not (path == package or path.startswith(f"{package}.")):
            continue
        for name, value in list(getattr(module, "__dict__", {}).items()):
            for old, new in pairs:
                if value is old:
                    setattr(module, name, new)
                    changed.append(f"{path}.{name}")
                    break
    return changed


def _restore(key: str) -> list[str]:
    with _lock:
        pairs = _patched.pop(key, [])
        names = _swap(key, [(ours, original) for original, ours in pairs])
    logger.info("veerloss: restored %s: %s", key, ", ".join(names))
    return names
