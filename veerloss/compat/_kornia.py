"""Checks that the losses of kornia have in common, and how its modules keep their weights."""

from __future__ import annotations

from torch import Tensor, nn

from ._focal import peer_error


def check_pixels(pred: Tensor, target: Tensor, one_for_all: bool) -> None:
    if pred.shape[2:] != target.shape[1:] or not (one_for_all or pred.size(0) == target.size(0)):
        raise ValueError(f"pred and target shapes must be the same, got {list(pred.shape)} and {list(target.shape)}")
    if pred.device != target.device:
        raise ValueError(f"pred and target must be in the same device, got {pred.device} and {target.device}")


def require(condition: bool, message: str, error: str = "BaseError") -> None:
    if not condition:
        raise peer_error("kornia.core.exceptions", error, ValueError)(message)


def check_per_class(name: str, value: Tensor | None, pred: Tensor) -> None:
    if value is None:
        return
    if not isinstance(value, Tensor):
        raise peer_error("kornia.core.exceptions", "TypeCheckError", TypeError)(
            f"{name} must be a Tensor or None, got {type(value).__name__}"
        )
    require(value.shape == pred.shape[1:2], f"{name} must have the shape [{pred.size(1)}], got {list(value.shape)}")
    require(
        value.device == pred.device, f"{name} must be on the device of pred, {str(pred.device)!r}, got {str(value.device)!r}"
    )


def keep(module: nn.Module, name: str, value: Tensor | None) -> None:
    """A parameter as it is, anything else as a buffer that is not saved."""
    if isinstance(value, nn.Parameter):
        setattr(module, name, value)
    else:
        module.register_buffer(name, value, persistent=False)
