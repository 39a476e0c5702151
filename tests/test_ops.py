"""The operators as PyTorch sees them: schemas, fakes, autograd, compilation, layouts."""

import math

import pytest
import torch
from grid import labels, layouts, logits
from torch.library import opcheck

import veerloss

X, Y = logits((2, 3, 10)), labels((2, 3, 10), 3)


def samples():
    """Arguments of every forward operator, by name."""
    dense = torch.rand(2, 3, 10)
    alpha = torch.tensor([0.2, 0.3, 0.5])
    return {
        "sigmoid_focal_forward": [
            (X, dense, 0.25, None, 2.0, None, None, 1, 1.0, None),
            (X, Y, None, alpha, 0.5, torch.rand(2, 3, 10), 1, 0, 1.0, None),
            (X, dense, None, None, 2.0, None, None, 2, 0.5, torch.tensor(3)),
        ],
        "softmax_focal_forward": [
            (X, Y, 1.0, None, 2.0, 0.0, -100, 1, 1.0, None),
            (X, Y, 1.0, alpha, 0.5, 0.1, None, 0, 1.0, None),
            (X, Y, 0.5, None, 0.0, 0.0, 1, 2, 0.5, torch.tensor(3.0)),
        ],
        "lovasz_softmax_forward": [
            (X, Y, None, True, False, None, None, True, 1, True),
            (X, Y, torch.tensor([True, False, True]), False, True, alpha, 1, True, 0, True),
            (X.softmax(1), Y, None, False, True, None, None, False, 2, True),
        ],
        "lovasz_hinge_forward": [
            (X[:, :1], Y.clamp(max=1), True, None, 1, True),
            (X[:, :1], Y.clamp(max=1), False, 1, 0, True),
        ],
    }


@pytest.mark.parametrize("strided", [False, True])
@pytest.mark.parametrize(("name", "case"), [(n, i) for n, cases in samples().items() for i in range(len(cases))])
def test_opcheck(name, case, strided):
    x, *rest = samples()[name][case]
    if strided:
        x = x.transpose(1, 2).contiguous().transpose(1, 2)
    opcheck(getattr(torch.ops.veerloss, name).default, (x.detach().requires_grad_(), *rest))


def test_opcheck_backward():
    for name, cases in samples().items():
        for args in cases:
            x = args[0].detach()
            with torch.no_grad():
                loss, scale, *weights = getattr(torch.ops.veerloss, name)(*args)
            backward = getattr(torch.ops.veerloss, name.replace("forward", "backward")).default
            if name.startswith("lovasz"):
                options = (args[4], args[7], args[8]) if "softmax" in name else (args[2], args[4])
                opcheck(backward, (torch.ones_like(loss), x, weights[0], scale, *options))
            else:
                opcheck(backward, (torch.ones_like(loss), x, *args[1:8], scale))


def losses():
    image = (2, 3, 5, 4)
    y = labels(image, 3)
    return {
        "sigmoid dense": lambda x: veerloss.sigmoid_focal_loss(x, torch.ones_like(x), alpha=0.25),
        "sigmoid index": lambda x: veerloss.sigmoid_focal_loss(x, y, alpha=torch.tensor([0.2, 0.3, 0.5]), reduction="sum"),
        "softmax focal": lambda x: veerloss.softmax_focal_loss(x, y, alpha=torch.tensor(0.5), normalizer=torch.tensor(7.0)),
        "softmax smoothed": lambda x: veerloss.softmax_focal_loss(x, y, label_smoothing=0.1, normalizer=3),
        "lovasz softmax": lambda x: veerloss.lovasz_softmax_loss(x, y, classes=[0, 2], per_image=True),
        "lovasz hinge": lambda x: veerloss.lovasz_hinge_loss(x[:, 0], y.clamp(max=1)),
    }


@pytest.fixture(autouse=True)
def fresh_compiler():
    """Else the compilations of one test count against the limit of the next."""
    torch._dynamo.reset()


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("loss", losses())
def test_compile_whole_graph(loss, dynamic):
    function = losses()[loss]
    compiled = torch.compile(lambda x: function(2 * x), fullgraph=True, dynamic=dynamic)
    x = logits((2, 3, 5, 4))
    grads = []
    for run in (lambda x: function(2 * x), compiled):
        value = x.clone().requires_grad_()
        result = run(value)
        grads.append((result.detach(), torch.autograd.grad(result, value)[0]))
    torch.testing.assert_close(grads[1], grads[0])
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), grads[0][0])


@pytest.mark.parametrize("loss", losses())
def test_compile_whole_graph_of_the_reference(loss, monkeypatch):
    import veerloss._arguments as arguments

    monkeypatch.setattr(arguments, "choose_backend", lambda *_: "reference")
    function = losses()[loss]
    x = logits((2, 3, 5, 4))
    torch.testing.assert_close(torch.compile(function, fullgraph=True, backend="aot_eager")(x), function(x))


@pytest.mark.parametrize("loss", losses())
def test_second_derivative_is_refused(loss):
    x = logits((2, 3, 5, 4)).requires_grad_()
    (gradient,) = torch.autograd.grad(losses()[loss](x), x, create_graph=True)
    with pytest.raises(RuntimeError, match=r"no second derivative; use backend='reference'"):
        gradient.square().sum().backward()


@pytest.mark.parametrize("loss", losses())
def test_no_copy_of_channels_last(loss):
    """Neither of the logits on their way in, nor of the gradient on its way out."""
    x = layouts(logits((2, 3, 5, 4)))["channels_last"].requires_grad_()
    gradient = torch.autograd.grad(losses()[loss](x), x)[0]
    if loss != "lovasz hinge":  # there the gradient of x[:, 0] is embedded by PyTorch
        assert gradient.stride() == x.stride()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True) as profile:
        losses()[loss](x)
    names = {"aten::contiguous", "aten::clone", "aten::copy_"}
    large = [e.name for e in profile.events() if e.name in names and math.prod(e.input_shapes[0]) > x.size(1)]
    assert not large, large  # copies of [C] options are small


@pytest.mark.parametrize("loss", losses())
def test_autocast_and_parameters(loss):
    """Half-precision logits of an autocast network go in as they are."""
    layer = torch.nn.Conv2d(4, 3, 1)
    with torch.autocast("cpu", torch.bfloat16):
        out = layer(torch.randn(2, 4, 5, 4))
        assert out.dtype == torch.bfloat16
        losses()[loss](out).backward()
    assert layer.weight.grad.isfinite().all()
