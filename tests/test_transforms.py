"""What PyTorch does with a loss besides calling it and its backward pass: torch.func, forward mode, export, tracing, meta
tensors; and what it says when memory is out."""

import functools

import pytest
import torch
from grid import labels, logits
from torch.autograd import forward_ad
from torch.func import grad, jvp, vjp, vmap

from veerloss import lovasz_hinge_loss, lovasz_softmax_loss, ops, sigmoid_focal_loss, softmax_focal_loss

X, Y = logits((2, 3, 40)), labels((2, 3, 40), 3)
CASES = {
    "softmax focal": (softmax_focal_loss, X, Y, {}),
    "sigmoid focal": (sigmoid_focal_loss, X, Y, {}),
    "sigmoid focal, dense": (sigmoid_focal_loss, X, (X > 0).float(), {}),
    "exact": (lovasz_softmax_loss, X, Y, {"method": "exact"}),
    "histogram": (lovasz_softmax_loss, X, Y, {"method": "histogram"}),
    "hinge": (lovasz_hinge_loss, X[:, 0], Y.clamp(max=1), {"per_image": False}),
}
over_cases = pytest.mark.parametrize("case", CASES)


def loss_of(case, backend):
    function, x, y, options = CASES[case]
    return functools.partial(function, backend=backend, **options), x, y


def pushed_forward(loss, x, y):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(loss(forward_ad.make_dual(x, torch.ones_like(x)), y)).tangent


TRANSFORMS = {
    "grad": lambda loss, x, y: grad(loss)(x, y),
    "vjp": lambda loss, x, y: vjp(lambda x: loss(x, y), x)[1](torch.ones(()))[0],
    "jvp": lambda loss, x, y: jvp(lambda x: loss(x, y), (x,), (torch.ones_like(x),))[1],
    "forward_ad": pushed_forward,
    "vmap": lambda loss, x, y: vmap(lambda x, y: loss(x[None], y[None]))(x, y),
    "vmap of grad": lambda loss, x, y: vmap(grad(lambda x, y: loss(x[None], y[None])))(x, y),
}


@over_cases
@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("backend", ["native", "auto"])
def test_transforms_of_kernels_say_what_to_do(backend, transform, case):
    with pytest.raises(RuntimeError, match=r"or torch\.autograd\.grad, or backend='reference'"):
        TRANSFORMS[transform](*loss_of(case, backend))


#: The reference of method "histogram" goes by the number of its bins, which depends on the data: no vmap, no meta tensors.
NO_SHAPES = "histogram"


@pytest.mark.parametrize(
    ("transform", "case"), [(t, c) for t in TRANSFORMS for c in CASES if not (t.startswith("vmap") and c == NO_SHAPES)]
)
def test_transforms_of_the_reference(transform, case):
    loss, x, y = loss_of(case, "reference")
    found = TRANSFORMS[transform](loss, x, y)
    leaf = x.clone().requires_grad_()
    if transform.startswith("vmap"):
        each = torch.stack([loss(leaf[i : i + 1], y[i : i + 1]) for i in range(2)])
        expected = each.detach() if transform == "vmap" else torch.autograd.grad(each.sum(), leaf)[0]
    else:
        expected = torch.autograd.grad(loss(leaf, y), leaf)[0]
        if transform in ("jvp", "forward_ad"):
            expected = expected.sum()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("backend", "case"),
    [
        (b, c)
        for b in ("native", "triton", "reference", "auto")
        for c in CASES
        if (b, c) not in (("reference", NO_SHAPES), ("triton", "histogram"))
    ],
)
def test_meta_tensors(backend, case):
    loss, x, y = loss_of(case, backend)
    x = x.to("meta").requires_grad_()
    result = loss(x, y.to("meta"))
    result.backward()
    assert result.shape == () and result.is_meta and x.grad.shape == x.shape


class Loss(torch.nn.Module):
    def __init__(self, function, **options):
        super().__init__()
        self.loss = functools.partial(function, **options)

    def forward(self, x, y):
        return self.loss(x, y)


@pytest.mark.parametrize("function", [sigmoid_focal_loss, softmax_focal_loss, lovasz_softmax_loss])
def test_export_of_any_height(function):
    """Also of one that is the number of classes."""
    height = torch.export.Dim("height", min=2, max=1000)
    x, y = logits((2, 3, 8, 5)), labels((2, 3, 8, 5), 3)
    exported = torch.export.export(Loss(function), (x, y), dynamic_shapes={"x": {2: height}, "y": {1: height}})
    for h in (3, 2, 17):
        x, y = logits((2, 3, h, 5)), labels((2, 3, h, 5), 3)
        torch.testing.assert_close(exported.module()(x, y), function(x, y))


@pytest.mark.parametrize("ignore_index", [None, 255])
def test_exact_exported_without_gradient_has_one(ignore_index):
    x, y = logits((2, 3, 40)), labels((2, 3, 40), 3, ignore_index=ignore_index)
    options = {"method": "exact", "ignore_index": ignore_index}
    with torch.no_grad():
        exported = torch.export.export(Loss(lovasz_softmax_loss, **options), (x, y)).module()
        traced = torch.jit.trace(Loss(lovasz_softmax_loss, **options), (x, y), check_trace=False)
    leaf = x.clone().requires_grad_()
    expected = torch.autograd.grad(lovasz_softmax_loss(leaf, y, **options), leaf)[0]
    for loss in (exported, traced):
        torch.testing.assert_close(torch.autograd.grad(loss(leaf, y), leaf)[0], expected)


def test_weights_that_were_not_kept_are_named():
    arguments = {"scale": torch.ones(3), "errors": 0, "per_image": False, "ignore_index": None, "valid_pixels": None}
    with pytest.raises(ValueError, match="weights must be the weights of a forward pass that kept them"):
        torch.ops.veerloss.lovasz_exact_backward(
            grad=torch.ones(()), logits=X, target=Y, weights=torch.ones(0), reduction=1, **arguments
        )


@pytest.mark.parametrize("stem", ["softmax_focal", "sigmoid_focal", "lovasz_exact", "lovasz_histogram"])
def test_out_of_memory(stem):
    """Of logits of one element in memory no gradient can be allocated; in the words that searches for a batch size know."""
    from samples import backward_arguments, samples

    operators = ops.operators("native")
    arguments = backward_arguments(operators, stem, samples()[stem][0])
    pixels = 1 << (30 if stem.startswith("lovasz") else 46)
    classes = 1 << (16 if stem.startswith("lovasz") else 0)
    c = arguments["logits"].size(1)
    arguments["logits"] = torch.zeros(1, 1, 1).expand(1, c * classes, pixels)
    dense = arguments["target"].dim() == 3
    arguments["target"] = (
        arguments["target"].new_zeros(1, 1, 1).expand(1, c, pixels)
        if dense
        else arguments["target"].new_zeros(1, 1).expand(1, pixels)
    )
    with pytest.raises(RuntimeError, match=r"DefaultCPUAllocator: can't allocate memory: veerloss tried to allocate \d+ bytes"):
        getattr(operators, f"{stem}_backward")(**arguments)
