"""The operators as PyTorch sees them: schemas, fakes, autograd, compilation, layouts."""

import math

import pytest
import torch
from grid import labels, layouts, logits, over_compound_kernels, over_histogram_kernels
from samples import FOCAL, HINGE, LOVASZ, backward_arguments, names, samples, strided, valid
from torch.library import opcheck

import veerloss
from veerloss import _arguments, _autograd, ops
from veerloss._layout import MAX_BINS, TABLE, Errors

# (backend, operator family)
OPERATORS = [(b, stem) for b in ("native", "triton", "emulated") for stem in (*FOCAL, "lovasz_exact")]
OPERATORS += [(b, stem) for stem in ("lovasz_histogram", "region") for b in ("native", "emulated")] + [("native", "compound")]
over_samples = pytest.mark.parametrize(
    ("backend", "stem", "case"), [(b, stem, i) for b, stem in OPERATORS for i in range(len(samples()[stem]))],
    indirect=["backend"],
)  # fmt: skip


# ---- schemas, fakes, autograd


@over_samples
@pytest.mark.parametrize("layout", ["contiguous", "strided"])
def test_opcheck(backend, stem, case, layout):
    arguments = samples()[stem][case]
    x = arguments["logits"] if layout == "contiguous" else strided(arguments["logits"])
    x = x.clone(memory_format=torch.preserve_format).requires_grad_()
    opcheck(getattr(ops.operators(backend), f"{stem}_forward").default, (), arguments | {"logits": x})
    arguments = backward_arguments(ops.operators(backend), stem, arguments | {"logits": x.detach()})
    opcheck(getattr(ops.operators(backend), f"{stem}_backward").default, (), arguments)


@pytest.mark.parametrize(("namespace", "stem"), [(n, stem) for n in ops.NAMESPACES.values() for stem in ops.stems_of(n)])
def test_backward_takes_arguments_and_results_of_forward(namespace, stem):
    """By name: that is what autograd goes by. And `logits` is the argument that has a gradient."""
    forward, backward = (getattr(getattr(torch.ops, namespace), f"{stem}_{d}").default._schema for d in ("forward", "backward"))
    known = [*names(forward.arguments), *names(forward.returns)]
    assert len(known) == len({*known})
    assert {*names(backward.arguments)} - {"grad"} <= {*known}
    assert "logits" in names(backward.arguments) and forward.returns[0].name == "loss"
    for argument in backward.arguments:
        same = [a for a in forward.arguments if a.name == argument.name]
        assert all(str(a.type) == str(argument.type) for a in same), argument.name


@over_samples
def test_autograd_calls_backward_by_name(backend, stem, case):
    """Whatever the order of the arguments."""
    operators, arguments = ops.operators(backend), samples()[stem][case]
    arguments = arguments | {"logits": arguments["logits"].clone().requires_grad_()}
    loss, *_ = getattr(operators, f"{stem}_forward")(**dict(reversed(arguments.items())))
    (gradient,) = torch.autograd.grad(loss, arguments["logits"], torch.ones_like(loss))
    expected = getattr(operators, f"{stem}_backward")(**backward_arguments(operators, stem, arguments))
    torch.testing.assert_close(gradient, expected.detach(), rtol=0, atol=0)


def test_autograd_refuses_a_backward_that_forward_does_not_serve():
    library = torch.library.Library("veerloss_of_a_test", "FRAGMENT")
    library.define("bad_forward(Tensor logits) -> (Tensor loss, Tensor scale)")
    library.define("bad_backward(Tensor grad, Tensor logits, Tensor scale, Tensor weights) -> Tensor")
    with pytest.raises(ValueError, match=r"bad_backward: \['weights'\] are neither arguments nor results of .*bad_forward"):
        _autograd.SavedByName("veerloss_of_a_test", "bad")


# ---- operators called directly check their arguments


def shorter(t: torch.Tensor) -> torch.Tensor:
    return t.flatten()[:-1].clone()


#: (operator, argument, what is done to it)
BAD = [
    *((f"{stem}_forward", "logits", torch.Tensor.char) for stem in (*FOCAL, *LOVASZ)),
    *((f"{stem}_forward", "target", shorter) for stem in (*FOCAL, *LOVASZ)),
    *((f"{stem}_forward", "class_alpha", lambda _: torch.ones(6)[::2]) for stem in FOCAL),
    ("sigmoid_focal_forward", "weight", lambda _: torch.ones(1, 3, 10)),
    *((f"{stem}_backward", "grad", lambda _: torch.ones(2, 2)) for stem in (*FOCAL, *LOVASZ)),
    ("lovasz_exact_backward", "weights", lambda _: torch.zeros(0)),
    ("lovasz_exact_backward", "weights", torch.Tensor.half),
    ("lovasz_exact_backward", "scale", shorter),
    ("lovasz_histogram_count", "table", shorter),
    ("lovasz_histogram_count", "table", torch.Tensor.double),
    ("lovasz_histogram_count", "counts", torch.Tensor.long),
    ("lovasz_histogram_count", "counts", lambda counts: counts[..., :100].contiguous()),
    ("lovasz_histogram_count", "largest", shorter),
    ("lovasz_histogram_count", "largest", torch.Tensor.long),
    ("lovasz_histogram_count", "segment_mask", lambda _: torch.ones(2, dtype=torch.bool)),
    ("lovasz_histogram_place", "counts", shorter),
    ("lovasz_histogram_place", "counts", torch.Tensor.double),
    ("lovasz_histogram_place", "counts", lambda counts: counts[..., :-1].contiguous()),
    ("lovasz_histogram_place", "counted_table", lambda _: torch.ones(5)),
    ("lovasz_histogram_place", "bins", lambda _: TABLE),
    ("lovasz_histogram_place", "bins", lambda _: MAX_BINS + 1),
    ("lovasz_histogram_weigh", "counts", shorter),
    ("lovasz_histogram_weigh", "largest", shorter),
    ("lovasz_histogram_weigh", "table", shorter),
    ("lovasz_histogram_weigh", "recounted_mask", lambda _: torch.ones((1, 3), dtype=torch.bool)),  # alone
    ("lovasz_histogram_sum", "units", shorter),
    ("lovasz_histogram_sum", "errors", lambda _: Errors.SOFTMAX),
    *(("lovasz_histogram_backward", name, shorter) for name in ("table", "weights", "scale")),
    ("region_sum", "logits", torch.Tensor.char),
    ("region_sum", "target", shorter),
    ("region_sum", "activation", lambda _: 3),
    ("region_weigh", "sums", shorter),
    ("region_weigh", "sums", torch.Tensor.int),
    ("region_weigh", "form", lambda _: -1),
    ("region_weigh", "class_weight", lambda _: torch.ones(2)),
    ("region_backward", "grad", lambda _: torch.ones(2, 2)),
    *(("region_backward", name, shorter) for name in ("coefficients", "scale")),
    *(
        (f"compound_{step}", name, spoil)
        for step in ("count", "exact", "sum")
        for name, spoil in (
            ("logits", torch.Tensor.char),
            ("target", shorter),
            ("focal_sums", shorter),
            ("focal_sums", torch.Tensor.float),
            ("region_sums", shorter),
            ("region_sums", torch.Tensor.int),
            ("class_alpha", lambda _: torch.ones(6)[::2]),
            ("errors", lambda _: Errors.PROBABILITIES),
        )
    ),
    *(("compound_count", name, shorter) for name in ("table", "counts", "largest")),
    ("compound_exact", "valid_pixels", lambda _: 21),
    *(("compound_backward", name, shorter) for name in ("table", "weights", "scale", "target")),
    ("compound_backward", "focal_scale", torch.Tensor.half),
    ("compound_backward", "grad", lambda _: torch.ones(2, 2)),
]


@pytest.mark.parametrize(
    ("backend", "operator", "argument", "spoil"),
    [(b, *bad) for b, stem in OPERATORS for bad in BAD if bad[0].startswith(stem)],
    indirect=["backend"],
)
def test_operators_check_their_arguments(backend, operator, argument, spoil):
    """The error names the argument, and tells what it is; that of a compiled library names the operator too."""
    # (The whole of method "histogram" is its steps, of which the first complains.)
    operators = ops.operators(backend)
    arguments = valid(operators, operator)
    getattr(operators, operator)(**arguments)
    name = "veerloss" if backend == "triton" else f"veerloss::{operator.replace('histogram_forward', 'histogram_count')}"
    with pytest.raises((ValueError, RuntimeError), match=f"^{name}: {argument} must be .+, got .+"):
        getattr(operators, operator)(**arguments | {argument: spoil(arguments[argument])})


@pytest.mark.parametrize(("backend", "stem"), [o for o in OPERATORS if o[1] in LOVASZ], indirect=["backend"])
def test_a_hinge_has_one_channel(backend, stem):
    arguments = samples()[stem][HINGE] | {"logits": logits((2, 3, 10))}
    with pytest.raises((ValueError, RuntimeError), match=r"logits must be \[N, 1, P\].*got \[2, 3, 10\]"):
        getattr(ops.operators(backend), f"{stem}_forward")(**arguments)


@over_histogram_kernels
@pytest.mark.parametrize("value", [-1.0, 2.0**24, math.nan, math.inf], ids=str)
def test_a_table_of_cells_past_the_bins(value, backend):
    """The CPU refuses it; a GPU does not read it to find out, and stays within its bins."""
    backward = ops.operators(backend).lovasz_histogram_backward
    arguments = valid(ops.operators(backend), "lovasz_histogram_backward")
    arguments["table"] = arguments["table"].index_fill(2, torch.tensor([TABLE // 2]), value)
    if ops.NAMESPACES[backend] == "veerloss":
        with pytest.raises((ValueError, RuntimeError), match="table must be of cells that lie within the bins"):
            backward(**arguments)
    else:
        assert backward(**arguments).shape == arguments["logits"].shape


@over_histogram_kernels
@pytest.mark.parametrize("step", ["count", "place", "weigh", "sum"])
def test_steps_change_what_their_schema_says(step, backend):
    operators, name = ops.operators(backend), f"lovasz_histogram_{step}"
    opcheck(getattr(operators, name).default, (), valid(operators, name), test_utils="test_schema")


@over_compound_kernels
@pytest.mark.parametrize("step", ["count", "exact", "sum"])
def test_steps_of_compound_losses_change_what_their_schema_says(step, backend):
    operators, name = ops.operators(backend), f"compound_{step}"
    opcheck(getattr(operators, name).default, (), valid(operators, name), test_utils="test_schema")


# ---- compilation


def losses():
    image = (2, 3, 5, 4)
    y, soft = labels(image, 3), logits(image, seed=5).sigmoid()
    return {
        "sigmoid dense": lambda x: veerloss.sigmoid_focal_loss(x, torch.ones_like(x), alpha=0.25),
        "sigmoid index": lambda x: veerloss.sigmoid_focal_loss(x, y, alpha=torch.tensor([0.2, 0.3, 0.5]), reduction="sum"),
        "softmax focal": lambda x: veerloss.softmax_focal_loss(x, y, alpha=torch.tensor(0.5), normalizer=torch.tensor(7.0)),
        "softmax smoothed": lambda x: veerloss.softmax_focal_loss(x, y, label_smoothing=0.1, normalizer=3),
        "softmax probabilities": lambda x: veerloss.softmax_focal_loss(x, soft),
        "softmax weighted": lambda x: veerloss.softmax_focal_loss(x, y, weight=torch.ones(5, 4), normalizer=torch.tensor(7.0)),
        "sigmoid background": lambda x: veerloss.sigmoid_focal_loss(x, y + 1, background_index=3),
        "lovasz softmax": lambda x: veerloss.lovasz_softmax_loss(x, y, classes=[0, 2], per_image=True),
        "lovasz hinge": lambda x: veerloss.lovasz_hinge_loss(x[:, 0], y.clamp(max=1)),
        "lovasz softmax, histogram": lambda x: veerloss.lovasz_softmax_loss(x, y, classes="all", method="histogram"),
        "lovasz hinge, histogram": lambda x: veerloss.lovasz_hinge_loss(x[:, 0], y.clamp(max=1), method="histogram"),
        "dice": lambda x: veerloss.dice_loss(x, y, classes=[1, 2], per_image=True),
        "tversky": lambda x: veerloss.tversky_loss(x, y, alpha=0.3, form="log", exponent=0.3),
        "jaccard, soft": lambda x: veerloss.jaccard_loss(x, soft, activation="sigmoid", squared=True),
        "compound": lambda x: veerloss.compound_loss(
            x, y, focal=1.0, lovasz=1.0, dice=1.0, method="exact", alpha=torch.tensor([0.2, 0.3, 0.5]), return_parts=True
        )[0],
        "compound, histogram": lambda x: veerloss.compound_loss(x, y, cross_entropy=1, lovasz=1, tversky=2, method="histogram"),
        "compound without lovasz": lambda x: veerloss.compound_loss(x, y, cross_entropy=1, dice=1, label_smoothing=0.1),
        "compound of a mask": lambda x: veerloss.compound_loss(
            x[:, 0], y.clamp(max=1), focal=1, lovasz=1, dice=1, activation="sigmoid", per_image=True
        ),
    }


over_losses = pytest.mark.parametrize("loss", losses())


@pytest.fixture(autouse=True)
def fresh_compiler():
    """Else the compilations of one test count against the limit of the next."""
    torch._dynamo.reset()


# Every loss through the front end and autograd. What inductor generates around an operator depends on its fake kernel and its
# strides; that is compiled, which takes seconds, around one loss of each family.
@pytest.mark.parametrize(
    ("loss", "compiler", "dynamic"),
    [(loss, "aot_eager", dynamic) for loss in losses() for dynamic in (False, True)]
    + [("sigmoid index", "inductor", False)]
    + [(loss, "inductor", True) for loss in ("softmax focal", "lovasz softmax", "lovasz hinge, histogram")],
)
def test_compile_whole_graph(loss, compiler, dynamic):
    function = losses()[loss]
    compiled = torch.compile(lambda x: function(2 * x), fullgraph=True, dynamic=dynamic, backend=compiler)
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
    monkeypatch.setattr(_arguments, "choose_backend", lambda *_: "reference")
    function = losses()[loss]
    x = logits((2, 3, 5, 4))
    torch.testing.assert_close(torch.compile(function, fullgraph=True, backend="aot_eager")(x), function(x))


@over_losses
def test_gradcheck(loss):
    """PyTorch's, with a gradient of the loss that is undefined too, as an unused branch has it."""
    x = logits((2, 3, 5, 4), torch.float64).requires_grad_()
    if "histogram" in loss:  # which bins the errors: an undefined gradient alone
        undefined = torch._C._functions.UndefinedGrad()(losses()[loss](x))
        assert torch.autograd.grad(undefined, x, torch.ones_like(undefined), allow_unused=True) == (None,)
    else:
        assert torch.autograd.gradcheck(losses()[loss], x)


@over_losses
def test_second_derivative_is_refused(loss):
    x = logits((2, 3, 5, 4)).requires_grad_()
    (gradient,) = torch.autograd.grad(losses()[loss](x), x, create_graph=True)
    with pytest.raises(RuntimeError, match=r"no second derivative; use backend='reference'"):
        gradient.square().sum().backward()


@over_losses
def test_no_copy_of_channels_last(loss):
    """Neither of the logits on their way in, nor of the gradient on its way out."""
    x = layouts(logits((2, 3, 5, 4)))["channels_last"].requires_grad_()
    gradient = torch.autograd.grad(losses()[loss](x), x)[0]
    whole = loss not in ("lovasz hinge", "lovasz hinge, histogram", "compound of a mask")  # of x[:, 0] PyTorch embeds it
    if whole:
        assert gradient.stride() == x.stride()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True) as profile:
        value = losses()[loss](x)
        if whole:
            value.backward()
    copies = {"aten::contiguous", "aten::clone", "aten::copy_"}
    large = [e.name for e in profile.events() if e.name in copies and 4 * math.prod(e.input_shapes[0]) > x.numel()]
    assert not large, large  # copies of options and coefficients of classes are small


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@over_losses
def test_autocast(loss, dtype, backend, monkeypatch):
    """Half-precision logits go in as they are; the loss is float32, so that the usual scale of a gradient scaler fits."""
    if backend == "reference":
        monkeypatch.setattr(_arguments, "choose_backend", lambda *_: "reference")
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
