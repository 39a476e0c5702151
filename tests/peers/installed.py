"""Which peers are missing here."""

import importlib
import importlib.util

PEERS = ("fvcore", "kornia", "monai", "pytorch_toolbelt", "segmentation_models_pytorch", "torchvision", "transformers")


def missing() -> list[str]:
    """The peers that are not installed, or that cannot be imported and why."""
    found = [name for name in PEERS if importlib.util.find_spec(name) is None]
    if found:
        return found
    for name in PEERS:
        try:
            importlib.import_module(name)
        except Exception as error:  # torchvision beside a build of torch that it was not made for: a RuntimeError
            found.append(f"{name} ({type(error).__name__})")
    return found


MISSING = missing()
