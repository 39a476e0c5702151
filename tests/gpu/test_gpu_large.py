"""Batches of more than 2^31 elements, which 32 bits do not count."""

import pytest
import torch
from gpu_cases import evaluate, needs_gpu, over_cases, over_focal_backends
from torch import Tensor

from veerloss import sigmoid_focal_loss

pytestmark = needs_gpu

IMAGES, CLASSES, PIXELS = 9, 4, 60_000_001
assert IMAGES * CLASSES * PIXELS > 2**31
SHIFT = 1009


@pytest.fixture
def image(request):
    """One image of bfloat16 logits [1, 4, P] and its target, uint8; skips where the GPU has too little memory."""
    torch.cuda.empty_cache()
    node = request.node.name
    gigabytes = 30 if "exact" not in node else 75 if "native" in node else 110
    if torch.cuda.mem_get_info()[0] < gigabytes << 30:
        pytest.skip(f"needs {gigabytes} GB of free memory on the GPU")
    generator = torch.Generator("cuda").manual_seed(0)
    x = torch.randn(1, CLASSES, PIXELS, generator=generator, device="cuda", dtype=torch.bfloat16) * 2
    yield x, torch.randint(0, CLASSES, (1, PIXELS), generator=generator, device="cuda", dtype=torch.uint8)
    torch.cuda.empty_cache()


def images(x: Tensor) -> Tensor:
    """A batch of copies of one image, copy k with its pixels moved on by k * SHIFT."""
    batch = x.new_empty(IMAGES, *x.shape[1:])
    for k in range(IMAGES):
        batch[k] = x[0].roll(k * SHIFT, -1)
    return batch


@over_cases("focal", but="dense")
def test_past_2_31_elements(case, image):
    """Every pixel's gradient is the one that it has in a batch of its image alone."""
    x, y = image
    _, expected = evaluate(case, x, y, reduction="sum")
    loss, gradient = evaluate(case, images(x), images(y), reduction="sum")
    assert loss.isfinite()
    for k in range(IMAGES):
        assert torch.equal(gradient[k].roll(-k * SHIFT, -1), expected[0])


@over_focal_backends
def test_past_2_31_elements_focal_dense(backend, image):
    x = image[0]
    target = (x > 1).byte()
    results = []
    for value, t in ((x, target), (images(x), images(target))):
        value = value.requires_grad_()
        loss = sigmoid_focal_loss(value, t, reduction="sum", backend=backend)
        results.append(torch.autograd.grad(loss, value)[0])
    for k in range(IMAGES):
        assert torch.equal(results[1][k].roll(-k * SHIFT, -1), results[0][0])


@over_cases("lovasz-softmax")
def test_past_2_31_elements_of_lovasz(case, image):
    check_copies(case, image)


@over_cases("region")
def test_past_2_31_elements_of_region_losses(case, image):
    check_copies(case, image)


def check_copies(case, image):
    """The loss of copies of an image is that of the image; the gradients of the copies of a pixel add up to its own."""
    x, y = image
    with torch.autocast("cuda", torch.bfloat16):  # for a float32 loss
        loss, expected = evaluate(case, x, y)
        of_copies, gradient = evaluate(case, images(x), images(y))
    torch.testing.assert_close(of_copies, loss, rtol=1e-5, atol=0)
    total = torch.zeros_like(expected[0], dtype=torch.float32)
    for k in range(IMAGES):
        total += gradient[k].roll(-k * SHIFT, -1)
    expected = expected[0].float()
    assert (total - expected).norm() <= 1e-2 * expected.norm()  # bfloat16 gradients
