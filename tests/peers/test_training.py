"""A training run with a peer's loss, and the same run through veerloss.patch: the same curve, and the same network at its end.

Small networks of the peers on made-up pictures, whose classes can be learnt in a few steps.
"""

import importlib
import sys
import textwrap
from collections.abc import Callable

import monai
import pytest
import segmentation_models_pytorch as smp
import torch
from torch import Tensor, nn

import veerloss
from veerloss.compat import lovasz_losses
from veerloss.compat import monai as our_monai
from veerloss.compat import segmentation_models_pytorch as our_smp

STEPS = 30


@pytest.fixture(autouse=True)
def one_thread():
    """Sums of the networks in one order, on any machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def pictures(n: int, size: int, ignore_index: int | None = None) -> tuple[Tensor, Tensor]:
    """[n, 3, size, size] and labels: a disc of class 1 and a square of class 2 on background, each of a colour, and noise."""
    generator = torch.Generator().manual_seed(0)
    places = torch.arange(size)
    labels = torch.zeros(n, size, size, dtype=torch.long)
    for i in range(n):
        row, column, top, left = torch.randint(size // 4, size // 2, (4,), generator=generator)
        labels[i, top : top + size // 3, left + size // 8 : left + size // 2] = 2
        labels[i][(places[:, None] - row) ** 2 + (places - column) ** 2 < (size // 5) ** 2] = 1
    x = nn.functional.one_hot(labels, 3).movedim(-1, 1) + 0.7 * torch.randn(n, 3, size, size, generator=generator)
    if ignore_index is not None:
        labels[:, : size // 8] = ignore_index
    return x, labels


def train(network: nn.Module, loss: Callable, x: Tensor, target: Tensor, lr: float) -> tuple[Tensor, Tensor]:
    """(the losses, the logits of the trained network)."""
    optimizer = torch.optim.SGD(network.parameters(), lr=lr, momentum=0.9)
    curve = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        value = loss(network(x), target)
        value.backward()
        optimizer.step()
        curve.append(value.detach())
    with torch.no_grad():
        return torch.stack(curve), network(x)


def mean_iou(logits: Tensor, labels: Tensor) -> float:
    found, valid = logits.argmax(1)[labels != 255], labels[labels != 255]
    each = [((found == c) & (valid == c)).sum() / ((found == c) | (valid == c)).sum() for c in range(logits.size(1))]
    return torch.stack(each).mean().item()


def same_run(run: Callable[[], tuple[Tensor, Tensor]], patched: Callable[[], veerloss.patching.Patch], labels: Tensor) -> None:
    theirs, logits_there = run()
    with patched():
        ours, logits = run()
    assert (ours - theirs).abs().max() < 1e-3, (ours, theirs)
    assert ours[-1] < 0.6 * ours[0], ours  # it learns
    iou = mean_iou(logits_there, labels)
    assert iou > 0.6 and mean_iou(logits, labels) == pytest.approx(iou, abs=1e-3)


def test_smp_unet_with_its_lovasz_loss():
    x, labels = pictures(4, 64, ignore_index=255)
    used = []

    def run():
        torch.manual_seed(0)
        # Batch norm over few values makes of the peer's gradient, which is right to 1e-4, another run: hence no deeper.
        network = smp.Unet("resnet18", encoder_depth=3, encoder_weights=None, decoder_channels=(32, 16, 16), classes=3)
        loss = smp.losses.LovaszLoss("multiclass", ignore_index=255)
        used.append(type(loss))
        return train(network, loss, x, labels, lr=0.05)

    theirs = smp.losses.LovaszLoss
    same_run(run, lambda: veerloss.patch("segmentation_models_pytorch"), labels)
    assert used == [theirs, our_smp.LovaszLoss]


def test_monai_unet_with_its_focal_loss():
    x, labels = pictures(2, 64)
    used = []

    def run():
        torch.manual_seed(0)
        network = monai.networks.nets.UNet(2, 3, 3, channels=(8, 16, 32), strides=(2, 2))
        loss = monai.losses.FocalLoss(to_onehot_y=True)
        used.append(type(loss))
        return train(network, loss, x, labels.unsqueeze(1), lr=0.5)

    theirs = monai.losses.FocalLoss
    same_run(run, lambda: veerloss.patch("monai"), labels)
    assert used == [theirs, our_monai.FocalLoss]


def test_monai_unet_with_its_dice_and_cross_entropy():
    x, labels = pictures(2, 64)
    used = []

    def run():
        torch.manual_seed(0)
        network = monai.networks.nets.UNet(2, 3, 3, channels=(8, 16, 32), strides=(2, 2))
        loss = monai.losses.DiceCELoss(to_onehot_y=True, softmax=True, include_background=False)
        used.append(type(loss))
        return train(network, loss, x, labels.unsqueeze(1), lr=0.1)

    theirs = monai.losses.DiceCELoss
    same_run(run, lambda: veerloss.patch("monai"), labels)
    assert used == [theirs, our_monai.DiceCELoss]


#: Berman's interface, as short as it can be: a project's copy of his file.
BERMAN = """
    import torch

    def lovasz_grad(gt_sorted):
        total = gt_sorted.sum()
        jaccard = 1 - (total - gt_sorted.cumsum(0)) / (total + (1 - gt_sorted).cumsum(0))
        return torch.cat([jaccard[:1], jaccard[1:] - jaccard[:-1]])

    def lovasz_softmax(probas, labels, classes="present", per_image=False, ignore=None):
        probas, labels = probas[labels != ignore], labels[labels != ignore]
        losses = []
        for c in labels.unique():
            foreground = (labels == c).float()
            errors, order = (foreground - probas[:, c]).abs().sort(descending=True)
            losses.append((errors * lovasz_grad(foreground[order])).sum())
        return torch.stack(losses).mean()
"""


class PointNet(nn.Module):
    """Points [P, 3], and the number of the cloud of each, to logits [P, C]: each point beside the mean of its cloud."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.point = nn.Sequential(nn.Linear(3, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU())
        self.head = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, classes))

    def forward(self, points: Tensor, cloud: Tensor) -> Tensor:
        features = self.point(points)
        sums = features.new_zeros(int(cloud.max()) + 1, 32).index_add(0, cloud, features)
        means = sums / cloud.bincount().unsqueeze(1)
        return self.head(torch.cat([features, means[cloud]], 1))


def test_point_cloud_with_a_copy_of_bermans_file(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "cloud_project").mkdir()
    (tmp_path / "cloud_project" / "lovasz_losses.py").write_text(textwrap.dedent(BERMAN))
    (tmp_path / "cloud_project" / "trainer.py").write_text("from cloud_project.lovasz_losses import lovasz_softmax\n")
    importlib.invalidate_caches()
    trainer = importlib.import_module("cloud_project.trainer")
    used, theirs = [], trainer.lovasz_softmax
    points = torch.randn(3000, 3, generator=torch.Generator().manual_seed(0))
    cloud = torch.arange(3000) // 1000
    labels = (points[:, 0] > -0.5).long() + (points[:, 0] + points[:, 1] > 0.8).long()
    labels[::7] = 255

    def run():
        torch.manual_seed(0)
        used.append(trainer.lovasz_softmax)

        def loss(logits, target):
            return trainer.lovasz_softmax(logits.softmax(1), target, ignore=255)

        network = PointNet(3)
        return train(_OfClouds(network, cloud), loss, points, labels, lr=0.3)

    try:
        same_run(run, lambda: veerloss.patch("lovasz_losses", at="cloud_project.lovasz_losses"), labels)
    finally:
        for name in [name for name in sys.modules if name.partition(".")[0] == "cloud_project"]:
            del sys.modules[name]
    assert used == [theirs, lovasz_losses.lovasz_softmax]


class _OfClouds(nn.Module):
    def __init__(self, network: nn.Module, cloud: Tensor) -> None:
        super().__init__()
        self.network, self.cloud = network, cloud

    def forward(self, points: Tensor) -> Tensor:
        return self.network(points, self.cloud)
