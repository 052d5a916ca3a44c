"""Train and export the four small models of this folder on scikit-learn's handwritten digits.

    pip install "onnxcompress[train]"
    python models/train_digits.py                  # all four, a few minutes on one core
    python models/train_digits.py digits_vit --out /tmp/models

Each run writes ``NAME.onnx``, ``NAME.calib.npz`` (unlabelled images of the training part) and
``NAME.eval.npz`` (held-out images with ``labels``). Nothing is chosen by looking at the held-out
part: the weights of the last epoch are exported, and the accuracy is measured once, with
onnxruntime.
"""

# torch is not installed where the type checker runs in continuous integration.
# mypy: allow-subclassing-any, no-warn-return-any, allow-untyped-calls

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
import torch
import torch.nn.functional as F  # noqa: N812 - torch's own convention
from sklearn.datasets import load_digits
from torch import Tensor, nn

SEED = 20
OPSET = 17
EVAL_SAMPLES = 500
CALIB_SAMPLES = 256
INPUT, OUTPUT = "image", "logits"


# --- the models
# --------------------------------------------------------------------------------------


class ResidualBlock(nn.Module):
    """Two 3×3 convolutions with batch normalization around a shortcut (He et al. 2016)."""

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or channels != width:
            self.shortcut = nn.Sequential(
                nn.Conv2d(channels, width, 1, stride, bias=False), nn.BatchNorm2d(width)
            )

    def forward(self, x: Tensor) -> Tensor:
        """[N, channels, H, W] to [N, width, H/stride, W/stride]."""
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


class ResNet(nn.Module):
    """Residual CNN of widths 16, 32 and 64; its batch normalizations stay in the exported file."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(1, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU()
        )
        self.blocks = nn.Sequential(
            ResidualBlock(16, 16, 1),
            ResidualBlock(16, 16, 1),
            ResidualBlock(16, 32, 2),
            ResidualBlock(32, 32, 1),
            ResidualBlock(32, 64, 2),
        )
        self.head = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Images [N, 1, 8, 8] to logits [N, 10]."""
        y = self.blocks(self.stem(x))
        pooled = torch.flatten(F.adaptive_avg_pool2d(y, 1), 1)
        return self.head(pooled)


def separable(channels: int, width: int, stride: int) -> nn.Sequential:
    """A depthwise 3×3 and a pointwise convolution, each with batch normalization and ReLU6."""
    return nn.Sequential(
        nn.Conv2d(channels, channels, 3, stride, 1, groups=channels, bias=False),
        nn.BatchNorm2d(channels),
        nn.ReLU6(),
        nn.Conv2d(channels, width, 1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU6(),
    )


class DepthwiseSeparableCNN(nn.Module):
    """MobileNet-like CNN (Howard et al. 2017); its batch normalizations are folded on export."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(1, 32, 3, 1, 1, bias=False), nn.BatchNorm2d(32), nn.ReLU6()
        )
        self.blocks = nn.Sequential(
            separable(32, 64, 1),
            separable(64, 64, 2),
            separable(64, 128, 1),
            separable(128, 128, 2),
        )
        self.head = nn.Linear(128, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Images [N, 1, 8, 8] to logits [N, 10]."""
        y = self.blocks(self.stem(x))
        pooled = torch.flatten(F.adaptive_avg_pool2d(y, 1), 1)
        return self.head(pooled)


class TransformerBlock(nn.Module):
    """Pre-norm self-attention and feed-forward, one projection for query, key and value."""

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """Tokens [N, T, width] to tokens of the same shape."""
        tokens, width = int(x.shape[1]), int(x.shape[2])
        depth = width // self.heads
        # [batch, tokens, 3, heads, depth] -> three times [batch, heads, tokens, depth]
        qkv = self.qkv(self.norm1(x)).reshape(-1, tokens, 3, self.heads, depth)
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        weights = torch.softmax(query @ key.transpose(-2, -1) * (1 / math.sqrt(depth)), dim=-1)
        mixed = (weights @ value).permute(0, 2, 1, 3).reshape(-1, tokens, width)
        x = x + self.proj(mixed)
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


class VisionTransformer(nn.Module):
    """Vision transformer (Dosovitskiy et al. 2021): 2×2 patches, 3 blocks of width 64."""

    def __init__(self) -> None:
        super().__init__()
        width, patch = 64, 2
        tokens = (8 // patch) ** 2
        self.embed = nn.Conv2d(1, width, patch, patch)
        self.position = nn.Parameter(0.02 * torch.randn(1, tokens, width))
        self.blocks = nn.Sequential(*(TransformerBlock(width, 4, 128) for _ in range(3)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Images [N, 1, 8, 8] to logits [N, 10]."""
        y = torch.flatten(self.embed(x), 2).transpose(1, 2) + self.position
        return self.head(self.norm(self.blocks(y)).mean(1))


class RowLSTM(nn.Module):
    """One LSTM layer of 96 units that reads the eight rows of an image from top to bottom."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(8, 96, batch_first=True)
        self.hidden = nn.Linear(96, 64)
        self.head = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Images [N, 1, 8, 8] to logits [N, 10]."""
        _, (last, _) = self.lstm(x.squeeze(1))
        return self.head(F.relu(self.hidden(last.squeeze(0))))


@dataclass(frozen=True, slots=True)
class Job:
    """How one model is built and trained."""

    build: Callable[[], nn.Module]
    epochs: int
    learning_rate: float
    fold_batch_norm: bool = True


JOBS: dict[str, Job] = {
    "digits_resnet": Job(ResNet, epochs=40, learning_rate=4e-3, fold_batch_norm=False),
    "digits_dscnn": Job(DepthwiseSeparableCNN, epochs=50, learning_rate=5e-3),
    "digits_vit": Job(VisionTransformer, epochs=200, learning_rate=1.5e-3),
    "digits_lstm": Job(RowLSTM, epochs=120, learning_rate=5e-3),
}


# --- data
# --------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Digits:
    """Images [N, 1, 8, 8] float32 in 0..1 with labels [N] int64, and the held-out part."""

    train_images: npt.NDArray[np.float32]
    train_labels: npt.NDArray[np.int64]
    eval_images: npt.NDArray[np.float32]
    eval_labels: npt.NDArray[np.int64]


def load_data() -> Digits:
    """1297 training and 500 held-out images, drawn with a fixed seed.

    Raises:
        ValueError: If an image is in both parts.
    """
    data = load_digits()
    images = (data.images / 16.0).astype(np.float32)[:, None]
    labels = data.target.astype(np.int64)
    order = np.random.default_rng(SEED).permutation(len(images))
    held_out, train = order[:EVAL_SAMPLES], order[EVAL_SAMPLES:]
    if {i.tobytes() for i in images[held_out]} & {i.tobytes() for i in images[train]}:
        raise ValueError("an image is in the training and in the held-out part; change SEED")
    return Digits(images[train], labels[train], images[held_out], labels[held_out])


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Rotate by up to 12°, scale by up to 12 % and shift by up to one pixel, at random."""
    n = len(images)

    def uniform(limit: float) -> Tensor:
        return (2 * torch.rand(n, generator=generator) - 1) * limit

    angle, scale = uniform(math.radians(12)), 1 + uniform(0.12)
    cosine, sine = torch.cos(angle) * scale, torch.sin(angle) * scale
    shift_x, shift_y = uniform(0.25), uniform(0.25)  # the image spans -1..1: one pixel is 0.25
    theta = torch.stack([cosine, -sine, shift_x, sine, cosine, shift_y], dim=1).reshape(n, 2, 3)
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, align_corners=False)


# --- training and export
# -----------------------------------------------------------------------------


def train(job: Job, data: Digits) -> nn.Module:
    """Train with AdamW, one cosine cycle and label smoothing; returns the model in eval mode."""
    torch.manual_seed(SEED)
    generator = torch.Generator().manual_seed(SEED)
    model = job.build()
    images, labels = torch.from_numpy(data.train_images), torch.from_numpy(data.train_labels)
    batch = 64
    optimizer = torch.optim.AdamW(model.parameters(), lr=job.learning_rate, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, job.learning_rate, epochs=job.epochs, steps_per_epoch=len(images) // batch
    )
    for _ in range(job.epochs):
        model.train()
        order = torch.randperm(len(images), generator=generator)
        for start in range(0, len(images) - batch + 1, batch):
            chosen = order[start : start + batch]
            logits = model(augment(images[chosen], generator))
            loss = F.cross_entropy(logits, labels[chosen], label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
    return model.eval()


def export(model: nn.Module, path: Path, *, fold_batch_norm: bool) -> None:
    """Write ``model`` as ONNX with a dynamic batch axis."""
    torch.onnx.export(
        model,
        (torch.zeros(2, 1, 8, 8),),
        path,
        input_names=[INPUT],
        output_names=[OUTPUT],
        dynamic_axes={INPUT: {0: "batch"}, OUTPUT: {0: "batch"}},
        opset_version=OPSET,
        dynamo=False,
        # The exporter folds BatchNormalization only where it knows that the model is for inference.
        training=torch.onnx.TrainingMode.EVAL
        if fold_batch_norm
        else torch.onnx.TrainingMode.PRESERVE,
    )
    proto = onnx.load(path)
    drop_zero_states(proto)
    onnx.checker.check_model(proto, full_check=True)
    path.write_bytes(proto.SerializeToString(deterministic=True))


def drop_zero_states(proto: onnx.ModelProto) -> None:
    """Leave out LSTM's initial states, which the exporter builds as zeros of the batch's size.

    An absent initial state is zero (ONNX LSTM, inputs ``initial_h`` and ``initial_c``).
    """
    graph = proto.graph
    for node in graph.node:
        if node.op_type == "LSTM":
            del node.input[4:]
    read = {name for node in graph.node for name in node.input} | {o.name for o in graph.output}
    while dead := [n for n in graph.node if not read.intersection(n.output)]:
        for node in dead:
            graph.node.remove(node)
        read = {name for node in graph.node for name in node.input} | {o.name for o in graph.output}
    for tensor in [t for t in graph.initializer if t.name not in read]:
        graph.initializer.remove(tensor)


def accuracy(path: Path, data: Digits) -> float:
    """Share of the held-out images that the exported file classifies rightly."""
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (logits,) = session.run([OUTPUT], {INPUT: data.eval_images})
    return float((np.asarray(logits).argmax(1) == data.eval_labels).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description="Train and export the digits models.")
    known = ", ".join(JOBS)
    parser.add_argument("names", nargs="*", help=f"which to train (default: all of {known})")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="where to write")
    args = parser.parse_args()
    if unknown := set(args.names) - set(JOBS):
        parser.error(f"unknown model: {', '.join(sorted(unknown))}")
    torch.set_num_threads(1)  # the same sums in the same order on every machine
    torch.use_deterministic_algorithms(True)
    data = load_data()
    args.out.mkdir(parents=True, exist_ok=True)
    for name in args.names or JOBS:
        started = time.perf_counter()
        path = args.out / f"{name}.onnx"
        export(train(JOBS[name], data), path, fold_batch_norm=JOBS[name].fold_batch_norm)
        calib = {INPUT: data.train_images[:CALIB_SAMPLES]}
        held_out = {INPUT: data.eval_images, "labels": data.eval_labels}
        for role, arrays in (("calib", calib), ("eval", held_out)):
            np.savez_compressed(args.out / f"{name}.{role}.npz", allow_pickle=False, **arrays)
        print(
            f"{name}: top-1 {accuracy(path, data):.3f} on {EVAL_SAMPLES} held-out images, "
            f"{path.stat().st_size / 1000:.0f} kB, {time.perf_counter() - started:.0f} s"
        )


if __name__ == "__main__":
    main()
