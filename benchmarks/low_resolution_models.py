"""`python -m benchmarks.low_resolution_models`: a training step of models that upsample their logits, before and after."""

import gc
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import veerloss

from . import memory, report, timing

RESULTS = Path(__file__).parent / "results" / "low-resolution-models"
CLASSES = 150
Step = Callable[[nn.Module, Tensor, Tensor], Tensor]  # the loss


def of_logits(logits: Tensor, labels: Tensor, align_corners: bool = False) -> Tensor:
    return veerloss.softmax_focal_loss(logits, labels, gamma=0.0, upsample="bilinear", align_corners=align_corners)


def segformer() -> tuple[nn.Module, Step, Step]:
    """SegFormer-B0, with random weights."""
    from transformers import SegformerConfig, SegformerForSemanticSegmentation

    def step(model, images, labels):
        return model(pixel_values=images, labels=labels).loss

    def patched(model, images, labels):
        with veerloss.patch("transformers"):
            return step(model, images, labels)

    return SegformerForSemanticSegmentation(SegformerConfig(num_labels=CLASSES)), step, patched


def upernet() -> tuple[nn.Module, Step, Step]:
    """UperNet on a small ConvNeXt."""
    from transformers import ConvNextConfig, UperNetConfig, UperNetForSemanticSegmentation

    backbone = ConvNextConfig(
        hidden_sizes=[24, 48, 96, 192], depths=[1, 1, 2, 1], out_features=["stage1", "stage2", "stage3", "stage4"]
    )
    config = UperNetConfig(
        backbone_config=backbone, hidden_size=64, num_labels=CLASSES, auxiliary_in_channels=96, auxiliary_channels=32
    )

    def after(model, images, labels):
        features = model.backbone(images).feature_maps
        loss = of_logits(model.decode_head(features), labels)
        return loss + model.config.auxiliary_loss_weight * of_logits(model.auxiliary_head(features), labels)

    return UperNetForSemanticSegmentation(config), lambda m, x, y: m(pixel_values=x, labels=y).loss, after


def torchvision_fcn() -> tuple[nn.Module, Step, Step]:
    """DeepLabV3 on MobileNetV3."""
    from torchvision.models.segmentation import deeplabv3_mobilenet_v3_large as make

    model = make(weights=None, weights_backbone=None, num_classes=CLASSES, aux_loss=True)

    def before(model, images, labels):
        found = model(images)
        return F.cross_entropy(found["out"], labels) + 0.5 * F.cross_entropy(found["aux"], labels)

    def after(model, images, labels):
        features = model.backbone(images)
        low, auxiliary = model.classifier(features["out"]), model.aux_classifier(features["aux"])
        return of_logits(low, labels) + 0.5 * of_logits(auxiliary, labels)

    return model, before, after


def smp_fpn() -> tuple[nn.Module, Step, Step]:
    """FPN of segmentation-models-pytorch, whose segmentation head upsamples."""
    import segmentation_models_pytorch as smp

    model = smp.FPN("resnet18", encoder_weights=None, classes=CLASSES)

    def after(model, images, labels):
        convolution = model.segmentation_head[0]
        return of_logits(convolution(model.decoder(model.encoder(images))), labels, align_corners=True)

    return model, lambda m, x, y: F.cross_entropy(m(x), y), after


def dinov2() -> tuple[nn.Module, Step, Step]:
    """A linear head on the patches of a DINOv2 of the size of ViT-S, with 4 of its 12 layers."""
    from transformers import Dinov2Config, Dinov2Model

    config = Dinov2Config(hidden_size=384, num_hidden_layers=4, num_attention_heads=6, patch_size=14)
    model = nn.ModuleDict({"backbone": Dinov2Model(config), "head": nn.Conv2d(384, CLASSES, 1)})

    def low(model, images):
        patches = model["backbone"](images).last_hidden_state[:, 1:]  # the first token is of the class
        down, across = (n // config.patch_size for n in images.shape[2:])
        return model["head"](patches.mT.unflatten(2, (down, across)))

    def before(model, images, labels):
        return F.cross_entropy(F.interpolate(low(model, images), size=labels.shape[1:], mode="bilinear"), labels)

    return model, before, lambda m, x, y: of_logits(low(m, x), y)


MODELS = {
    "SegFormer-B0, transformers": segformer,
    "UperNet, ConvNeXt, transformers": upernet,
    "DeepLabV3, MobileNetV3, torchvision": torchvision_fcn,
    "FPN, ResNet-18, segmentation-models-pytorch": smp_fpn,
    "linear head on DINOv2, transformers": dinov2,
}


def inputs(size: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(2, 3, size, size, generator=generator)
    return images, torch.randint(CLASSES, (2, size, size), generator=generator)


def training_step(name: str, after: bool, size: int) -> Callable[[], None]:
    torch.manual_seed(0)
    model, *steps = MODELS[name]()
    model.train()
    images, labels = inputs(size)

    def step() -> None:
        model.zero_grad()
        steps[after](model, images, labels).backward()

    return step


def peak(name: str, after: bool, size: int) -> float:
    """Of a step beyond what is there before it, in MB; in this process."""
    training_step(name, after, 64)()
    step = training_step(name, after, size)
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")
    before = memory._status("VmRSS")
    step()
    return (memory._status("VmHWM") - before) / 1e6


def measure(name: str, size: int, seconds: float) -> dict:
    times = timing.interleave(
        {which: training_step(name, after, size) for after, which in enumerate(("before", "after"))},
        min_rounds=3,
        budget=seconds,
    )
    row = {"model": name}
    for after, which in enumerate(("before", "after")):
        arguments = [sys.executable, "-m", "benchmarks.low_resolution_models", "--peak", name, str(after), str(size)]
        done = subprocess.run(arguments, capture_output=True, text=True, check=True)
        row[which] = timing.summary(times[which]) | {"peak_mb": json.loads(done.stdout.splitlines()[-1])}
    return row


def markdown(results: dict) -> str:
    lines = [
        report.heading(results["machine"]),
        "",
        "| model | step before, ms | after | peak before, MB | after |",
        "|---|---|---|---|---|",
    ]
    for r in results["rows"]:
        b, a = r["before"], r["after"]
        lines.append(
            f"| {r['model']} | {b['median_ms']:.0f} | {a['median_ms']:.0f} | {b['peak_mb']:.0f} | {a['peak_mb']:.0f} |"
        )
    return "\n".join([*lines, ""])


def main(arguments: list[str] | None = None) -> int:
    parser = report.parser("benchmarks.low_resolution_models", __doc__)
    parser.add_argument("--peak", nargs=3, metavar=("MODEL", "AFTER", "SIZE"), help="of one, in this process")
    parser.add_argument("--size", type=int, default=512)
    options = parser.parse_args(arguments)
    torch.set_num_threads(memory.THREADS)
    if options.peak:
        print(json.dumps(peak(options.peak[0], options.peak[1] == "1", int(options.peak[2]))))
        return 0
    start = time.perf_counter()
    results: dict = {"machine": report.machine("benchmarks.low_resolution_models", arguments), "rows": []}
    for name in MODELS:
        if options.filter in name:
            report.log(name)
            results["rows"].append(measure(name, options.size, 20.0))
    results["machine"]["seconds"] = round(time.perf_counter() - start)
    report.save(results, markdown(results), options.output or (None if options.filter else RESULTS))
    return 0


if __name__ == "__main__":
    sys.exit(main())
