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
            (X, dense, 0.25, None, 2.0, None, None, 1, 1.0, None, False),
            (X, Y, None, alpha, 0.5, torch.rand(2, 3, 10), 1, 0, 1.0, None, True),
            (X, dense, None, None, 2.0, None, None, 2, 0.5, torch.tensor(3), False),
        ],
        "softmax_focal_forward": [
            (X, Y, 1.0, None, 2.0, 0.0, -100, 1, 1.0, None, False),
            (X, Y, 1.0, alpha, 0.5, 0.1, None, 0, 1.0, None, True),
            (X, Y, 0.5, None, 0.0, 0.0, 1, 2, 0.5, torch.tensor(3.0), False),
        ],
        "lovasz_softmax_forward": [
            (X, Y, None, True, False, None, None, True, 1, True, False),
            (X, Y, torch.tensor([True, False, True]), False, True, alpha, 1, True, 0, True, False),
            (X.softmax(1), Y, None, False, True, None, None, False, 2, True, False),
        ],
        "lovasz_hinge_forward": [
            (X[:, :1], Y.clamp(max=1), True, None, 1, True, False),
            (X[:, :1], Y.clamp(max=1), False, 1, 0, True, False),
        ],
        "lovasz_histogram_forward": [
            (X, Y, None, True, False, None, None, 0, 1, False),
            (X, Y, torch.tensor([True, False, True]), False, True, alpha, 1, 0, 0, True),
            (X.softmax(1), Y, None, False, True, None, None, 1, 2, False),
            (X[:, :1], Y.clamp(max=1), None, False, True, None, 1, 2, 1, False),
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
                loss, scale, *rest = getattr(torch.ops.veerloss, name)(*args)
            backward = getattr(torch.ops.veerloss, name.replace("forward", "backward")).default
            if "histogram" in name:
                table, weights, tops, _ = rest
                kept = (args[1], table, weights, tops, scale)
                opcheck(backward, (torch.ones_like(loss), x, *kept, args[7], args[4], args[6], args[8]))
            elif name.startswith("lovasz"):
                options = (args[4], args[7], args[8]) if "softmax" in name else (args[2], args[4])
                opcheck(backward, (torch.ones_like(loss), x, rest[0], scale, *options))
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
        "lovasz softmax, histogram": lambda x: veerloss.lovasz_softmax_loss(x, y, classes="all", method="histogram"),
        "lovasz hinge, histogram": lambda x: veerloss.lovasz_hinge_loss(x[:, 0], y.clamp(max=1), method="histogram"),
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


# (In the reference of "histogram" sizes come from the data: a graph cannot hold it.)
@pytest.mark.parametrize("loss", [name for name in losses() if "histogram" not in name])
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
    if not loss.startswith("lovasz hinge"):  # there the gradient of x[:, 0] is embedded by PyTorch
        assert gradient.stride() == x.stride()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True) as profile:
        value = losses()[loss](x)
        if not loss.startswith("lovasz hinge"):
            value.backward()
    names = {"aten::contiguous", "aten::clone", "aten::copy_"}
    large = [e.name for e in profile.events() if e.name in names and math.prod(e.input_shapes[0]) > x.size(1)]
    assert not large, large  # copies of [C] options are small


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("loss", losses())
def test_autocast(loss, dtype, backend, monkeypatch):
    """Half-precision logits go in as they are; the loss is float32, so that the usual scale of a gradient scaler fits."""
    import veerloss._arguments as arguments

    if backend == "reference":
        monkeypatch.setattr(arguments, "choose_backend", lambda *_: "reference")
    x = logits((2, 3, 5, 4)).to(dtype).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        value = losses()[loss](x)
    assert value.dtype == torch.float32
    (value * 65536 / 1024).backward()
    assert x.grad.dtype == dtype and x.grad.isfinite().all()
    torch.testing.assert_close(losses()[loss](x.detach()).float(), value.detach(), rtol=0.01, atol=0.01)
    scaled = losses()[loss](x)
    assert scaled.dtype == dtype


def test_autocast_compiles():
    x, y = logits((2, 3, 10)).bfloat16(), labels((2, 3, 10), 3)
    compiled = torch.compile(veerloss.softmax_focal_loss, fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", torch.bfloat16):
        for reduction in ("mean", "none"):
            actual = compiled(x, y, reduction=reduction)
            assert actual.dtype == torch.float32
            torch.testing.assert_close(actual, veerloss.softmax_focal_loss(x, y, reduction=reduction))


def test_operators_called_directly_check_their_arguments():
    forward, backward = torch.ops.veerloss.softmax_focal_forward, torch.ops.veerloss.softmax_focal_backward
    sigmoid, lovasz = torch.ops.veerloss.sigmoid_focal_forward, torch.ops.veerloss.lovasz_softmax_backward
    one, options = torch.ones(()), (1.0, None, 2.0, 0.0, None)
    for call, expected in (
        (lambda: forward(X.to(torch.int8), Y, *options, 1, 1.0, None, False), "logits of float32"),
        (lambda: sigmoid(X.to(torch.int8), X, None, None, 2.0, None, None, 0, 1.0, None, False), "logits of float32"),
        (lambda: forward(X, Y.T.contiguous(), *options, 1, 1.0, None, False), r"a target \[N, P\]"),
        (lambda: forward(X, Y, 1.0, torch.ones(6)[::2], 2.0, 0.0, None, 1, 1.0, None, False), "class_alpha"),
        (lambda: backward(torch.ones(1, 1), X, Y, *options, 0, one), "a gradient of the shape of the loss"),
        (lambda: lovasz(one, X, torch.zeros(3, 2, 10).half(), torch.ones(3), False, True, 1), "the weights of a forward pass"),
        (lambda: lovasz(one, X, torch.zeros(0), torch.ones(3), False, True, 1), "the weights of a forward pass"),
        (lambda: torch.ops.veerloss.lovasz_hinge_forward(X, Y, False, None, 1, True, False), r"logits \[N, 1, P\]"),
    ):
        with pytest.raises((ValueError, RuntimeError), match=expected):
            call()
