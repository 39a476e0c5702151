"""process_group: ranks with batches of their own get the loss, and their part of the gradient, of one process with all."""

import datetime
import functools
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from grid import labels, logits
from torch.nn.parallel import DistributedDataParallel

from veerloss import LovaszSoftmaxLoss, compound_loss, dice_loss, lovasz_hinge_loss, lovasz_softmax_loss, tversky_loss

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="torch was built without gloo")


def batches() -> dict:
    """name: (loss, logits, target, options, sizes): sizes[k] images of the whole batch belong to rank k."""
    y = labels((5, 4, 9, 7), 3)  # class 3 is absent
    y[0] = 2  # the first rank has one class only
    ignored = y.clone()
    ignored[2:4] = 255  # the second rank has no valid pixel
    large = torch.randint(0, 3, (4, 300, 301), generator=torch.Generator().manual_seed(0))
    large[torch.rand(large.shape, generator=torch.Generator().manual_seed(1)) < 0.995] = 0  # rare: its bins are placed again
    x, binary = logits((5, 4, 9, 7)), labels((5, 2, 9, 7), 2)
    weight = torch.tensor([1.0, 2.0, 0.5, 1.0])
    softmax, hinge = (functools.partial(loss, method="histogram") for loss in (lovasz_softmax_loss, lovasz_hinge_loss))
    soft = torch.rand(x.shape, generator=torch.Generator().manual_seed(2))
    everything = {"focal": 0.7, "lovasz": 1.3, "dice": 0.5, "method": "histogram"}
    return {
        "different sizes": (softmax, x, y, {}, (1, 3, 1)),
        "an empty rank": (softmax, x, y, {"classes": "all"}, (5, 0, 0)),
        "nothing valid on a rank": (softmax, x, ignored, {"ignore_index": 255, "class_weight": weight}, (2, 2, 1)),
        "per class": (softmax, x, y, {"reduction": "none", "classes": [0, 3]}, (2, 2, 1)),
        "double": (softmax, x.double(), y, {"reduction": "sum"}, (2, 2, 1)),
        "probabilities": (softmax, x.softmax(1), y, {"from_logits": False}, (2, 2, 1)),
        "nothing valid at all": (softmax, x, torch.full_like(y, 255), {"ignore_index": 255}, (2, 2, 1)),
        "NaN": (softmax, x.index_fill(0, torch.tensor([3]), torch.nan), y, {}, (2, 2, 1)),
        "large": (softmax, logits((4, 3, 300, 301)), large, {}, (1, 2, 1)),
        "hinge": (hinge, x[:, 0], binary, {"per_image": False}, (2, 2, 1)),
        "hinge without foreground": (hinge, x[:, 0], 0 * binary, {"per_image": False}, (2, 3, 0)),
        "Dice": (dice_loss, x, y, {}, (1, 3, 1)),
        "Dice, large": (dice_loss, logits((4, 3, 300, 301)), large, {"classes": "present"}, (1, 2, 1)),
        "Tversky, an empty rank": (tversky_loss, x, ignored, {"ignore_index": 255, "form": "log"}, (0, 5, 0)),
        "compound": (compound_loss, x, y, everything | {"alpha": weight, "label_smoothing": 0.1}, (1, 3, 1)),
        "compound, an empty rank": (compound_loss, x, ignored, everything | {"ignore_index": 255}, (0, 5, 0)),
        "compound, large": (compound_loss, logits((4, 3, 300, 301)), large, everything, (1, 2, 1)),
        "compound without Lovász": (compound_loss, x, y, {"cross_entropy": 1.0, "dice": 1.0, "alpha": weight}, (2, 2, 1)),
        "compound without focal": (compound_loss, x, y, {"lovasz": 1.0, "jaccard": 1.0, "method": "histogram"}, (2, 2, 1)),
        "compound of a mask": (compound_loss, x[:, :1], binary, everything | {"activation": "sigmoid"}, (2, 2, 1)),
        "soft Dice": (dice_loss, x, soft, {"activation": "sigmoid", "squared": True, "reduction": "none"}, (2, 2, 1)),
    }


def cut(t: torch.Tensor, sizes: tuple[int, ...], rank: int, world: int) -> torch.Tensor:
    """The images of a rank; the last has those of the ranks that are not there."""
    begin = sum(sizes[:rank])
    return t[begin : begin + sizes[rank]] if rank < world - 1 else t[begin:]


def run(loss, x, target, **options):
    x = x.detach().clone().requires_grad_()
    value = loss(x, target, **options)
    value.sum().backward()
    return value.detach(), x.grad


def network():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Conv2d(2, 6, 3, padding=1), torch.nn.GELU(), torch.nn.Conv2d(6, 4, 1))


def images():
    return logits((5, 2, 12, 11)), labels((5, 4, 12, 11), 4)


def error_of(f) -> str:
    try:
        f()
    except Exception as e:
        return f"{type(e).__name__}: {e}"
    return "no error"


def errors(rank: int, group) -> dict[str, str]:
    """What every rank sees where one does something wrong."""
    x, y = logits((2, 4, 30)), labels((2, 4, 30), 4)
    first = rank == 0
    softmax = functools.partial(lovasz_softmax_loss, process_group=group)
    bad = y.clone()
    bad[0, 7] = 4 if first else 0
    return {
        "bad target": error_of(lambda: softmax(x, bad)),
        "bad target of the reference": error_of(lambda: softmax(x, bad, backend="reference")),
        "bad shape": error_of(lambda: softmax(x, y[:1] if first else y)),
        "bad backend": error_of(lambda: softmax(x, y, backend="gpu" if first else "native")),
        "other classes": error_of(lambda: softmax(x[:, : 3 + rank], y.clamp(max=2))),
        "other options": error_of(lambda: softmax(x, y, reduction="sum" if first else "mean")),
        "other weights": error_of(lambda: softmax(x, y, class_weight=torch.full((4,), 1.0 + rank))),
        "other ignore_index": error_of(lambda: softmax(x, y, ignore_index=255 if first else None)),
        "other background": error_of(lambda: softmax(x, y, background_index=4 if first else 5)),
        "other hinge": error_of(
            lambda: lovasz_hinge_loss(x[:, 0], y.clamp(max=1), per_image=False, ignore_index=rank + 2, process_group=group)
        ),
        "other types": error_of(lambda: softmax(x.double() if first else x, y)),
        "per class": error_of(lambda: lovasz_hinge_loss(x, x > 0, per_class=True, per_image=False, process_group=group)),
        "other backends": error_of(lambda: softmax(x, y, backend="reference" if first else "native")),
        "exact": error_of(lambda: softmax(x, y, method="exact")),
        "triton": error_of(lambda: softmax(x, y, backend="triton")),
        "per image": error_of(lambda: softmax(x, y, per_image=True)),
        "hinge per image": error_of(lambda: lovasz_hinge_loss(x[:, 0], y.clamp(max=1), process_group=group)),
        "compiled": error_of(lambda: torch.compile(softmax, backend="eager", fullgraph=True)(x, y)),
        "Dice, bad target": error_of(lambda: dice_loss(x, bad, process_group=group)),
        "Dice, other weights": error_of(lambda: tversky_loss(x, y, alpha=0.1 + rank, process_group=group)),
        "compound, bad target": error_of(lambda: compound_loss(x, bad, dice=1.0, process_group=group)),
        "compound, other weights": error_of(lambda: compound_loss(x, y, lovasz=1.0 + rank, process_group=group)),
        "compound per image": error_of(lambda: compound_loss(x, y, dice=1.0, per_image=True, process_group=group)),
        "compound, exact": error_of(lambda: compound_loss(x, y, lovasz=1.0, method="exact", process_group=group)),
        "Dice per image": error_of(lambda: dice_loss(x, y, per_image=True, process_group=group)),
        "no group": error_of(lambda: lovasz_softmax_loss(x, y, process_group=7)),
        "after all that": error_of(lambda: softmax(x, y)),
    }


def worker(rank: int, world: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", f"file://{folder}/store", rank=rank, world_size=world, timeout=datetime.timedelta(seconds=100)
    )
    group = dist.group.WORLD
    results = {"errors": errors(rank, group)}
    for name, (loss, x, target, options, sizes) in batches().items():
        mine = cut(x, sizes, rank, world), cut(target, sizes, rank, world)
        results[name] = run(loss, *mine, process_group=group, **options)
        if "large" not in name:  # in the reference it takes long
            results[name, "reference"] = run(loss, *mine, process_group=group, backend="reference", **options)
    model, (x, target) = DistributedDataParallel(network()), images()
    loss = LovaszSoftmaxLoss(process_group=group)
    value = loss(model(cut(x, (2, 1, 2), rank, world)), cut(target, (2, 1, 2), rank, world))
    (value * world).backward()
    results["parameters"] = value.detach(), [p.grad for p in model.parameters()]
    torch.save(results, Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


@functools.cache
def results_of(world: int, folder: str) -> list[dict]:
    multiprocessing.spawn(worker, (world, folder), nprocs=world)
    return [torch.load(Path(folder) / f"{rank}.pt") for rank in range(world)]


@pytest.fixture(scope="module", params=[2, 3])
def results(request, tmp_path_factory):
    sys.path.insert(0, str(Path(__file__).parent))  # for the workers, which import this file by its name
    return results_of(request.param, str(tmp_path_factory.mktemp(f"ranks{request.param}")))


@pytest.mark.parametrize("name", batches())
def test_as_one_process(results, name):
    loss, x, target, options, sizes = batches()[name]
    value, gradient = run(loss, x, target, **options)
    # Sums of integers have the same bits; of a focal term the sum is rounded, and so is a pixel at the end of a tile.
    rtol = 1e-6 if {"focal", "cross_entropy"} & {*options} else 0
    for rank, result in enumerate(results):
        found, part = result[name]
        torch.testing.assert_close(found, value, rtol=rtol, atol=0, equal_nan=True)
        torch.testing.assert_close(part, cut(gradient, sizes, rank, len(results)), rtol=rtol, atol=0, equal_nan=True)


@pytest.mark.parametrize("name", [name for name in batches() if "large" not in name])
def test_reference_as_one_process(results, name):
    loss, x, target, options, sizes = batches()[name]
    value, gradient = run(loss, x, target, backend="reference", **options)
    for rank, result in enumerate(results):
        found, part = result[name, "reference"]
        torch.testing.assert_close(found, value, equal_nan=True)
        torch.testing.assert_close(part, cut(gradient, sizes, rank, len(results)), equal_nan=True)


def test_distributed_data_parallel(results):
    """The loss times the number of ranks, as the docstring says."""
    model, (x, target) = network(), images()
    value = lovasz_softmax_loss(model(x), target, method="histogram")
    value.backward()
    for result in results:
        found, gradients = result["parameters"]
        torch.testing.assert_close(found, value.detach())
        for gradient, parameter in zip(gradients, model.parameters(), strict=True):
            torch.testing.assert_close(gradient, parameter.grad, rtol=1e-4, atol=1e-7)


def test_errors_reach_every_rank(results):
    first, *others = (result["errors"] for result in results)
    assert first["bad target"].startswith("IndexError: target holds 4, expected class indices in [0, 4)")
    assert first["bad target of the reference"] == first["bad target"] == first["Dice, bad target"]
    assert first["bad target"] == first["compound, bad target"]
    assert first["bad shape"].startswith("ValueError: target must have the shape [2, 30]")
    assert first["bad backend"].startswith("ValueError: backend must be one of")
    for other in others:
        for name in ("bad target", "bad target of the reference", "bad shape", "bad backend"):
            assert other[name] == "RuntimeError: process_group: the loss failed on rank 0; its error is there"
    for found in (first, *others):
        assert found["other classes"].startswith("ValueError: process_group: all ranks must have the same number of classes")
        for name in ("options", "weights", "ignore_index", "background", "hinge", "types", "backends"):
            assert found[f"other {name}"].endswith("and options that differ")
        assert "got per_class=True" in found["per class"]
        assert "got method='exact'" in found["exact"]
        assert found["triton"].startswith("RuntimeError: backend='triton' cannot run") and "process_group" in found["triton"]
        assert "got per_image=True" in found["per image"] and "got per_image=True" in found["hinge per image"]
        assert "cannot be used inside torch.compile" in found["compiled"]
        assert found["no group"].startswith(
            "TypeError: process_group must be a torch.distributed.ProcessGroup or None, got int"
        )
        assert "got per_image=True" in found["Dice per image"] and found["Dice, other weights"].endswith("options that differ")
        assert "got per_image=True" in found["compound per image"] and "got method='exact'" in found["compound, exact"]
        assert found["compound, other weights"].endswith("options that differ")
        assert found["after all that"] == "no error"
