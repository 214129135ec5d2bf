"""The training recipe: `python -m models.zoo.digits.train --work DIR`.

Needs torch, onnx and scikit-learn (the `convert` extra); made with torch 2.13.0 (CPU). For each package and version it
writes `DIR/<version>/<package>/float.onnx` and `golden.npz`, for the device package also the weights as `weights.npz` for
the TFLite recipe. Fixed seeds, one thread, deterministic kernels: a second run gives the same figures.
"""

from __future__ import annotations

import argparse
import copy
import warnings
from collections.abc import Sequence
from math import pi
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from models.tensor import Array
from models.zoo.digits.calibrate import fit_temperature
from models.zoo.digits.data import Part, golden_images, load_split, save_held_out

INK = 16.0
"""Largest pixel value; folded into the first layer, so that the graph takes raw pixels."""
OPSET = 17
"""IR version 8: read by every onnxruntime from 1.14 on."""
BATCH = 64


class Recipe(NamedTuple):
    """How one package version is trained. `members`: networks whose logits are averaged. `augment`: random affine changes."""

    package: str
    version: str
    network: str
    epochs: int
    augment: bool
    members: int = 1
    seed: int = 1


RECIPES = (
    Recipe("digits-int8", "1", "dense", epochs=25, augment=False),
    Recipe("digits-int8", "2", "dense", epochs=150, augment=False),
    Recipe("digits-cnn", "1", "cnn", epochs=20, augment=False),
    Recipe("digits-cnn", "2", "cnn", epochs=80, augment=True),
    Recipe("digits-large", "1", "wide", epochs=20, augment=False, members=3),
    Recipe("digits-large", "2", "wide", epochs=80, augment=True, members=3),
)


class Image(nn.Module):  # type: ignore[misc]  # torch is not analysed
    """Rows [n, 64] to one-channel images [n, 1, 8, 8]. Not nn.Unflatten: that exports as seven operations, this as one."""

    def forward(self, rows: Any) -> Any:
        return rows.reshape(-1, 1, 8, 8)


def dense() -> Any:
    """64 -> 32 -> 10: 2,410 weights, deliberately light."""
    return nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))


def cnn() -> Any:
    """Three convolutions, about 15,000 weights."""
    return nn.Sequential(
        Image(),
        *_convolution(1, 16),
        *_convolution(16, 32),
        nn.MaxPool2d(2),
        *_convolution(32, 32),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(32 * 4, 10),
    )


def wide() -> Any:
    """Four convolutions, three at full resolution: about 23,000 weights; three members do 6 times the work of `cnn`."""
    return nn.Sequential(
        Image(),
        *_convolution(1, 24),
        *_convolution(24, 24),
        *_convolution(24, 32),
        nn.MaxPool2d(2),
        *_convolution(32, 32),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Dropout(0.2),
        nn.Linear(32 * 4, 10),
    )


def _convolution(channels: int, filters: int) -> tuple[Any, Any, Any]:
    return nn.Conv2d(channels, filters, 3, padding=1, bias=False), nn.BatchNorm2d(filters), nn.ReLU()


NETWORKS = {"dense": dense, "cnn": cnn, "wide": wide}


class Classifier(nn.Module):  # type: ignore[misc]  # torch is not analysed
    """Raw pixels [n, 64] to probabilities [n, 10]: the softmax of the members' summed logits."""

    def __init__(self, members: Sequence[Any]) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)

    def forward(self, image: Any) -> Any:
        logits = self.members[0](image)
        for member in self.members[1:]:
            logits = logits + member(image)
        return torch.softmax(logits, dim=-1)


def augmented(images: Any, generator: Any) -> Any:
    """Images [n, 64] rotated by up to 10 degrees, scaled by up to 10 % and shifted by up to one pixel, each at random."""
    count = len(images)
    rotate, scale, right, down = 2 * torch.rand((4, count), generator=generator) - 1
    angle, size = rotate * pi / 18, 1 + 0.1 * scale
    cos, sin, pixel = torch.cos(angle) * size, torch.sin(angle) * size, 2 / 8
    affine = torch.stack([cos, -sin, right * pixel, sin, cos, down * pixel], dim=1).view(count, 2, 3)
    grid = nn.functional.affine_grid(affine, [count, 1, 8, 8], align_corners=False)
    moved = nn.functional.grid_sample(images.view(count, 1, 8, 8), grid, align_corners=False)
    return moved.view(count, 64)


def train_member(recipe: Recipe, seed: int, train: Part) -> Any:
    """One network fitted to the train part: Adam, one-cycle learning rate, a fixed number of epochs, no early stopping."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    network = NETWORKS[recipe.network]()
    images, labels = torch.from_numpy(train.pixels()) / INK, torch.from_numpy(train.labels)
    steps = recipe.epochs * -(-len(labels) // BATCH)
    optimiser = torch.optim.AdamW(network.parameters(), weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, max_lr=1e-2, total_steps=steps)
    network.train()
    for _ in range(recipe.epochs):
        for rows in torch.randperm(len(labels), generator=generator).split(BATCH):
            batch = augmented(images[rows], generator) if recipe.augment else images[rows]
            loss = nn.functional.cross_entropy(network(batch), labels[rows])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
    return network.eval()


def folded(network: Any, divisor: float) -> Any:
    """A copy that takes raw pixels and whose logits are divided by `divisor`, without one more operation in the graph."""
    network = copy.deepcopy(network)
    first = next(layer for layer in network if isinstance(layer, (nn.Linear, nn.Conv2d)))
    with torch.no_grad():
        first.weight /= INK
        network[-1].weight /= divisor
        network[-1].bias /= divisor
    return network


def classifier(recipe: Recipe, train: Part, calibration: Part) -> tuple[Any, float]:
    """The trained classifier with its temperature folded in, and that temperature (fitted on the calibration part)."""
    members = [train_member(recipe, recipe.seed + index, train) for index in range(recipe.members)]
    with torch.no_grad():
        images = torch.from_numpy(calibration.pixels()) / INK
        logits = torch.stack([member(images) for member in members]).mean(dim=0).numpy()
    temperature = fit_temperature(logits, calibration.labels)
    return Classifier([folded(member, recipe.members * temperature) for member in members]).eval(), temperature


def probabilities(model: Any, images: Array) -> Array:
    """float32 [n, 10] for raw pixels float32 [n, 64]."""
    with torch.no_grad():
        return np.asarray(model(torch.from_numpy(images)).numpy())


def export(model: Any, path: Path) -> None:
    """Write the model as ONNX with a free batch dimension: `image` [-1, 64] -> `probabilities` [-1, 10]."""
    with warnings.catch_warnings():
        # The TorchScript exporter is announced as legacy; it needs neither onnxscript nor 9 s a model.
        warnings.simplefilter("ignore")
        torch.onnx.export(
            model,
            (torch.zeros(2, 64),),
            path,
            input_names=["image"],
            output_names=["probabilities"],
            dynamic_axes={"image": {0: "batch"}, "probabilities": {0: "batch"}},
            opset_version=OPSET,
            dynamo=False,
        )


def save_weights(model: Any, path: Path) -> None:
    """The dense net's folded weights as `<layer>.kernel` [in, out] and `<layer>.bias` [out], in order of the layers."""
    layers = [layer for layer in model.members[0] if isinstance(layer, nn.Linear)]
    arrays = {}
    for index, layer in enumerate(layers):
        arrays[f"{index}.kernel"] = layer.weight.detach().numpy().T
        arrays[f"{index}.bias"] = layer.bias.detach().numpy()
    np.savez(path, **arrays)


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the digits models and export them to ONNX.")
    parser.add_argument("--work", type=Path, default=Path("build/digits"), help="folder for the intermediate files")
    work = parser.parse_args().work
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    split = load_split()
    print(f"torch {torch.__version__}; train {len(split.train.labels)}, calibration {len(split.calibration.labels)}")
    golden = golden_images(split.calibration)
    for recipe in RECIPES:
        folder = work / recipe.version / recipe.package
        folder.mkdir(parents=True, exist_ok=True)
        model, temperature = classifier(recipe, split.train, split.calibration)
        export(model, folder / "float.onnx")
        arrays = {"in.image": golden, "out.probabilities": probabilities(model, golden)}
        np.savez_compressed(folder / "golden.npz", allow_pickle=False, **arrays)
        if recipe.network == "dense":
            save_weights(model, folder / "weights.npz")
        right = probabilities(model, split.calibration.pixels()).argmax(axis=1) == split.calibration.labels
        print(
            f"{recipe.package} {recipe.version}: calibration {right.mean():.4f}, temperature {temperature:.3f}",
            flush=True,
        )
    save_held_out(split.held_out, work / "heldout.npz")


if __name__ == "__main__":
    main()
