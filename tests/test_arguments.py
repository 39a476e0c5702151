"""Bad input: the error names the argument, its value and what was expected."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from grid import over_focal

import veerloss
from veerloss import _arguments as arguments
from veerloss import lovasz_hinge_loss, lovasz_softmax_loss, sigmoid_focal_loss, softmax_focal_loss

X = torch.zeros(2, 3, 4)
Y = torch.zeros(2, 4, dtype=torch.long)
MULTICLASS = [sigmoid_focal_loss, softmax_focal_loss, lovasz_softmax_loss]
ALL = [*MULTICLASS, lovasz_hinge_loss]


def target_of(function):
    return torch.zeros(2, 3, 4, dtype=torch.long) if function is lovasz_hinge_loss else Y


@pytest.mark.parametrize("function", ALL)
@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"reduction": "avg"}, ValueError, r"reduction must be one of .*'none'.*, got 'avg'"),
        ({"backend": "gpu"}, ValueError, r"backend must be one of .*, got 'gpu'"),
        ({"ignore_index": 1.5}, TypeError, r"ignore_index must be an int or None, got float"),
        ({"ignore_index": 2**63}, ValueError, r"ignore_index must fit in 64 bits, got 9223372036854775808"),
        ({"ignore_index": 10**5000}, ValueError, r"ignore_index must fit in 64 bits, got a number of more than 4300 digits"),
        ({"ignore_index": np.array([1, 2])}, TypeError, r"ignore_index must be an int or None, got ndarray array\(\[1, 2\]\)"),
        ({"ignore_index": torch.tensor(1)}, TypeError, r"ignore_index must be an int or None, got Tensor tensor\(1\)"),
        ({"reduction": np.array(["mean", "sum"])}, ValueError, r"reduction must be one of .*, got array\(\['mean', 'sum'\]"),
        ({"reduction": torch.zeros(2)}, ValueError, r"reduction must be one of .*, got tensor\(\[0., 0.\]\)"),
        ({"backend": np.array(["native", "auto"])}, ValueError, r"backend must be one of .*, got array"),
    ],
)
def test_common_options(function, options, error, match):
    with pytest.raises(error, match=match):
        function(X, target_of(function), **options)


@pytest.mark.parametrize("function", ALL)
def test_tensors(function):
    y = target_of(function)
    with pytest.raises(TypeError, match="logits must be a Tensor, got list"):
        function([1.0], y)
    with pytest.raises(TypeError, match="target must be a Tensor, got int"):
        function(X, 3)
    with pytest.raises(TypeError, match=r"logits must be float32.*got torch.int64"):
        function(X.long(), y)
    with pytest.raises(TypeError, match=r"target must .*got torch.complex64"):
        function(X, y.to(torch.complex64))
    with pytest.raises(ValueError, match=r"target must be on the device of logits, 'cpu', got 'meta'"):
        function(X, y.to("meta"))
    with pytest.raises(ValueError, match=r"target must have the shape.*\[2, 5\]"):
        function(X, Y.new_zeros(2, 5))
    with pytest.raises(ValueError, match="target must not require a gradient"):
        function(X, torch.zeros(2, 3, 4, requires_grad=True))


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("layout", [torch.strided, torch.jagged], ids=str)
@pytest.mark.parametrize("function", ALL)
def test_nested_tensors(function, layout):
    nested = torch.nested.nested_tensor([torch.zeros(3, 4), torch.zeros(3, 5)], layout=layout)
    with pytest.raises(TypeError, match=rf"logits must be a dense tensor, got a nested tensor of the layout {layout}"):
        function(nested, target_of(function))
    with pytest.raises(TypeError, match=rf"target must be a dense tensor, got a nested tensor of the layout {layout}"):
        function(X, nested)


@pytest.mark.parametrize("function", [softmax_focal_loss, lovasz_softmax_loss])
def test_class_indices(function):
    with pytest.raises(ValueError, match=r"target must have the shape \[2, 4\].*got \[2, 3, 4\]"):
        function(X, torch.zeros(2, 3, 4, dtype=torch.long))
    with pytest.raises(TypeError, match=r"target must hold class indices as uint8.*got torch.float32"):
        function(X, Y.float())
    with pytest.raises(ValueError, match=r"at least one class, got the shape \[2, 0, 4\]"):
        function(torch.zeros(2, 0, 4), Y)


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("dtype", [torch.int8, torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("bad", [3, -1, 100])
def test_targets_out_of_range(bad, dtype, backend):
    y = Y.clone()
    y[1, 2] = bad
    y = y.to(dtype)
    for function in MULTICLASS:
        with pytest.raises(IndexError, match=rf"target holds {bad}.*expected class indices in \[0, 3\)"):
            function(X, y, backend=backend)
        function(X, y, ignore_index=bad, backend=backend)
        with pytest.raises(IndexError, match=rf"target holds {bad}.*or ignore_index=17"):
            function(X, y, ignore_index=17, backend=backend)
    with pytest.raises(IndexError, match=rf"target holds {bad}.*expected 0 or 1"):
        lovasz_hinge_loss(X[:, 0], y, backend=backend)


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_the_first_bad_target_is_named(backend):
    y = torch.zeros(3, 5000, dtype=torch.long)
    y[1, 700], y[2, 5] = 8, 9
    with pytest.raises(IndexError, match="target holds 8"):
        softmax_focal_loss(torch.zeros(3, 4, 5000), y, backend=backend)


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_values_out_of_range(backend):
    for bad in (1.5, -0.25):
        y = torch.zeros(2, 3, 4)
        y[1, 1, 1] = bad
        with pytest.raises(IndexError, match=rf"target holds {bad}.*expected values in \[0, 1\]"):
            sigmoid_focal_loss(X, y, backend=backend)
    for bad in (0.5, 2.0, math.nan):
        with pytest.raises(IndexError, match=rf"target holds {bad:g}"):
            lovasz_hinge_loss(X, torch.full((2, 3, 4), bad), backend=backend)


def test_compiled_graphs_check_targets_too():
    compiled = torch.compile(lambda x, y: softmax_focal_loss(x, y), backend="aot_eager", fullgraph=True)
    with pytest.raises(IndexError, match="target holds 7"):
        compiled(X, Y + 7)


@pytest.mark.parametrize("function", [sigmoid_focal_loss, softmax_focal_loss])
@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"gamma": -0.5}, ValueError, r"gamma must be in \[0, inf\), got -0.5"),
        ({"gamma": math.nan}, ValueError, r"gamma must be in .*got nan"),
        ({"gamma": math.inf}, ValueError, r"gamma must be in .*got inf"),
        ({"gamma": "2"}, TypeError, r"gamma must be a number, got str '2'"),
        ({"gamma": 10**400}, ValueError, r"gamma must be in \[0, inf\), got 10{59}\.\.\.0{10}$"),
        ({"alpha": 10**400}, ValueError, r"alpha must be in .*, got 1000"),
        ({"normalizer": 10**5000}, ValueError, r"normalizer must be in \(0, inf\), got a number of more than 4300 digits"),
        ({"normalizer": Fraction(1, 10**400)}, ValueError, r"normalizer must be in \(0, inf\), got Fraction\(1, 1000"),
        ({"alpha": -0.1}, ValueError, r"alpha must be in \[0, .*got -0.1"),
        ({"alpha": torch.ones(4)}, ValueError, r"alpha must have the shape \[3\].*got \[4\]"),
        ({"alpha": torch.ones(3, requires_grad=True)}, ValueError, r"alpha must not require a gradient"),
        ({"alpha": torch.ones(3, device="meta")}, ValueError, r"alpha must be on the device of logits, 'cpu', got 'meta'"),
        ({"normalizer": 0}, ValueError, r"normalizer must be in \(0, inf\), got 0"),
        ({"normalizer": 2.0, "reduction": "sum"}, ValueError, r"normalizer replaces the divisor .*got reduction='sum'"),
        ({"normalizer": torch.ones(2)}, ValueError, r"normalizer must be .*got the shape \[2\]"),
        ({"normalizer": torch.eye(2).to_sparse()}, TypeError, r"normalizer must be a dense tensor, got .*torch.sparse_coo"),
    ],
)
def test_focal_options(function, options, error, match):
    with pytest.raises(error, match=match):
        function(X, Y, **options)


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("bad", [-0.25, math.nan, math.inf])
def test_class_probabilities(bad, dtype, backend):
    target = torch.full((2, 3, 4), 1 / 3, dtype=dtype)
    target[1, 2, 1] = bad
    with pytest.raises(IndexError, match=rf"target holds {bad}, expected finite values >= 0"):
        softmax_focal_loss(X, target, backend=backend)
    for shape in ((2, 4, 4), (2, 3, 5)):
        with pytest.raises(ValueError, match=rf"target must have the shape of logits, \[2, 3, 4\],.*got \{list(shape)}"):
            softmax_focal_loss(X, torch.zeros(shape, dtype=dtype), backend=backend)
    with pytest.raises(TypeError, match=rf"target must hold class indices as uint8.*got {dtype}"):
        softmax_focal_loss(X, Y.to(dtype), backend=backend)
    with pytest.raises(ValueError, match=r"at least one class, got the shape \[2, 0, 4\]"):
        softmax_focal_loss(X[:, :0], target[:, :0], backend=backend)


def test_softmax_focal_options():
    with pytest.raises(
        ValueError, match=r"weight must broadcast to the pixels, \[2, 4\] of logits \[2, 3, 4\], got \[2, 3, 4\]"
    ):
        softmax_focal_loss(X, Y, weight=torch.ones(2, 3, 4))
    with pytest.raises(TypeError, match=r"weight must be a Tensor or None, got float 2\.0"):
        softmax_focal_loss(X, Y, weight=2.0)
    with pytest.raises(ValueError, match="weight must not require a gradient"):
        softmax_focal_loss(X, Y, weight=torch.ones(2, 4, requires_grad=True))
    for bad in (-0.1, 1.1):
        with pytest.raises(ValueError, match=rf"label_smoothing must be in \[0, 1\], got {bad}"):
            softmax_focal_loss(X, Y, label_smoothing=bad)


def test_sigmoid_focal_options():
    with pytest.raises(ValueError, match=r"alpha must be in \[0, 1\], got 1.5"):
        sigmoid_focal_loss(X, Y, alpha=1.5)
    with pytest.raises(ValueError, match=r"weight must broadcast to logits, \[2, 3, 4\], got \[5, 1\]"):
        sigmoid_focal_loss(X, Y, weight=torch.ones(5, 1))
    with pytest.raises(TypeError, match="weight must be a Tensor or None, got float"):
        sigmoid_focal_loss(X, Y, weight=2.0)
    for bad, target, error, match in (
        (2, Y, ValueError, r"background_index must be no class, that is not in \[0, 3\), got 2"),
        (7, Y, ValueError, r"background_index must differ from ignore_index, got 7 for both"),
        (3.0, Y, TypeError, r"background_index must be an int or None, got float 3.0"),
        (3, X, ValueError, r"background_index is for a target of class indices \[N, \*\], got 3 for .*\[2, 3, 4\]"),
    ):
        with pytest.raises(error, match=match):
            sigmoid_focal_loss(X, target, ignore_index=7, background_index=bad)
    for backend in ("native", "reference"):
        with pytest.raises(IndexError, match=r"target holds 5, .*\[0, 3\), background_index=4 or ignore_index=7"):
            sigmoid_focal_loss(X, Y + 5, ignore_index=7, background_index=4, backend=backend)
    with pytest.raises(ValueError, match=r"one-channel logits \[2, 1, 4\].*expected target.unsqueeze\(1\)"):
        sigmoid_focal_loss(X[:, :1], Y)


def test_lovasz_options():
    for bad, error, match in (
        ("some", ValueError, r"classes must be one of .*'present'.*got 'some'"),
        (3, TypeError, r"classes must be .*got int 3"),
        (np.array([0, 1]), TypeError, r"classes must be .*got ndarray array\(\[0, 1\]\)"),
        (torch.tensor([0, 1]), TypeError, r"classes must be .*got Tensor tensor\(\[0, 1\]\)"),
        ([np.array([0, 1])], TypeError, r"classes must hold ints, got array\(\[0, 1\]\)"),
        ([10**5000], IndexError, r"classes holds a number of more than 4300 digits, expected class ids"),
        ([], ValueError, r"classes must hold at least one class id"),
        ([0, 0], ValueError, r"each once, got \[0, 0\]"),
        ([3], IndexError, r"classes holds 3, expected class ids in \[0, 3\)"),
        ([0.0], TypeError, r"classes must hold ints, got 0.0"),
    ):
        with pytest.raises(error, match=match):
            lovasz_softmax_loss(X, Y, classes=bad)
    for function in (lovasz_softmax_loss, lovasz_hinge_loss):
        y = target_of(function)
        with pytest.raises(TypeError, match="per_image must be True or False, got 1"):
            function(X, y, per_image=1)
        with pytest.raises(ValueError, match=r"method must be one of \('auto', 'exact', 'histogram'\), got 'fast'"):
            function(X, y, method="fast")
        with pytest.raises(ValueError, match=r"method must be one of .*, got array\(\['exact', 'auto'\]"):
            function(X, y, method=np.array(["exact", "auto"]))
    with pytest.raises(ValueError, match=r"class_weight must have the shape \[3\].*got \[2\]"):
        lovasz_softmax_loss(X, Y, class_weight=torch.ones(2))
    with pytest.raises(ValueError, match=r"logits must have the shape \[N, C, \*\], got \[4\]"):
        lovasz_softmax_loss(X[0, 0], Y[0])


def test_two_class_logits_in_the_hinge():
    with pytest.raises(ValueError, match=r"use lovasz_softmax_loss, or .*logits\[:, 1\] - logits\[:, 0\]"):
        lovasz_hinge_loss(torch.zeros(2, 2, 4, 4), torch.zeros(2, 4, 4, dtype=torch.long))


@over_focal
def test_all_real_numbers_are_numbers(backend):
    for number in (Fraction(1, 2), np.float16(0.5), np.float32(0.5), np.float64(0.5)):
        for function, more in ((softmax_focal_loss, {"label_smoothing": number}), (sigmoid_focal_loss, {})):
            options = {"gamma": number, "alpha": number, "normalizer": number} | more
            same = dict.fromkeys(options, 0.5)
            assert torch.equal(function(X, Y, **options, backend=backend), function(X, Y, **same, backend=backend))
    for two in (np.uint64(2), np.int8(2)):
        loss = softmax_focal_loss(X, Y, gamma=two, ignore_index=two, alpha=two, normalizer=two, backend=backend)
        assert torch.equal(loss, softmax_focal_loss(X, Y, gamma=2, ignore_index=2, alpha=2, normalizer=2, backend=backend))
    lovasz_softmax_loss(X, Y, classes=list(np.array([0, 2])))


def test_sizes_are_numbers_in_a_compiled_graph():
    """Symbolic ones, where a dimension is dynamic."""

    def loss(x, y):
        return softmax_focal_loss(x, y, normalizer=x.shape[0], gamma=x.shape[0] / 2, backend="native")

    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True, dynamic=True)
    for n in (2, 3, 4):
        x, y = torch.randn(n, 3, 4), torch.ones(n, 4, dtype=torch.long)
        torch.testing.assert_close(compiled(x, y), loss(x, y))


def test_layouts_and_types_that_no_kernel_reads():
    with pytest.raises(TypeError, match=r"logits must be a dense tensor, got the layout torch.sparse_coo"):
        softmax_focal_loss(X.to_sparse(), Y)
    with pytest.raises(TypeError, match=r"normalizer must be a float, integer or bool tensor, got torch.uint16"):
        softmax_focal_loss(X, Y, normalizer=torch.tensor(3, dtype=torch.uint16))


def test_large_targets_are_named_in_full():
    with pytest.raises(IndexError, match="target holds 1234567,"):
        softmax_focal_loss(X, Y + 1234567)


def test_options_are_keywords():
    for function in ALL:
        with pytest.raises(TypeError, match="positional argument"):
            function(X, Y, "present")


def test_public_names():
    assert set(veerloss.__all__) >= {f.__name__ for f in ALL}
    for name in veerloss.__all__:
        assert getattr(veerloss, name) is not None


def test_triton_on_a_cpu_is_refused(monkeypatch):
    monkeypatch.setattr(veerloss._extension, "_interpreted", False)
    with pytest.raises(RuntimeError, match=r"backend='triton' cannot run on device 'cpu': Triton kernels do not run on"):
        softmax_focal_loss(X, Y, backend="triton")


def test_backends_of_a_gpu(monkeypatch):
    """All losses have compiled kernels there, where they are loaded."""
    gpu = torch.device("cuda")
    monkeypatch.setitem(arguments.native_missing, "cuda", None)
    monkeypatch.setattr(arguments, "triton_missing", lambda _: None)
    without_triton = ("lovasz histogram", "region", "compound")
    for loss in arguments.LOSSES:
        assert arguments.choose_backend("auto", gpu, loss) == "native"
    monkeypatch.setitem(arguments.native_missing, "cuda", "no library")
    for loss in arguments.LOSSES:
        assert arguments.choose_backend("auto", gpu, loss) == ("reference" if loss in without_triton else "triton")
    with pytest.raises(RuntimeError, match="backend='native' cannot run on device 'cuda': no library"):
        arguments.choose_backend("native", gpu, "lovasz")
    monkeypatch.setattr(arguments, "triton_missing", lambda _: "no triton")
    for loss in arguments.LOSSES:
        assert arguments.choose_backend("auto", gpu, loss) == "reference"


def test_values_are_checked_on_a_gpu_if_asked_for(monkeypatch):
    gpu, cpu = torch.device("cuda"), torch.device("cpu")
    monkeypatch.delenv("VEERLOSS_CHECK", raising=False)
    assert arguments.checks_values("reference", gpu) and not arguments.checks_values("native", gpu)
    monkeypatch.setenv("VEERLOSS_CHECK", "1")
    assert arguments.checks_values("native", gpu) and arguments.checks_values("triton", gpu)
    assert not arguments.checks_values("native", cpu)  # its kernels do
