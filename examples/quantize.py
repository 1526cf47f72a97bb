"""Eight bits for what was trained: files for ONNX Runtime, and what they cost in accuracy.

python examples/quantize.py runs/classes
python examples/quantize.py runs/masks --keep-float depthwise

Writes RUN/onnx/float32.onnx and int8.onnx, the second calibrated with pictures that the run was
trained on, judges both on the pictures that training judged by, and the model itself in PyTorch
beside them: as it was trained, and with linear layers quantised by torchao.
"""

import argparse
import copy
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import onnxruntime
import torch
import train_classification
import train_segmentation
from predict import load_run
from timm.data import resolve_model_data_config
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms.v2.functional import center_crop
from tqdm import tqdm
from training.engine import Task
from training.errors import TrainingError, told_in_one_line
from training.hybrids import backbone_of
from training.streams import Shards

import tokenconv as tc
from tokenconv.surgery import inserted_modules


class Prepared(Dataset[Any]):
    """Samples as the model is given them."""

    def __init__(self, samples: Any, prepare: Callable[[Any], Any], most: int | None = None):
        count = len(samples) if most is None else min(most, len(samples))
        self.indices = [i * len(samples) // count for i in range(count)]
        self.samples = samples
        self.prepare = prepare

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Any:
        return self.prepare(self.samples[self.indices[index]])


class OnnxModel(nn.Module):
    """An ONNX file where a model is expected."""

    def __init__(self, path: Path):
        super().__init__()
        self.session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])

    def forward(self, images: Tensor) -> Tensor:
        """The first output."""
        return torch.from_numpy(self.session.run(None, {"images": images.numpy()})[0])


def task_of(model: nn.Module, args: argparse.Namespace) -> tuple[Task, Any, Any, Any]:
    """What a run was for, its samples to train on and to be judged by, and how they are prepared.

    Raises:
        TrainingError: If its data have no end.
    """
    if args.task == "classification":
        train, val, classes = train_classification.open_data(args)
        _, judge = train_classification.transforms(args, model, len(classes))
        task = train_classification.Classification(classes, mixup=None, smoothing=0.0)
    else:
        train, val, classes = train_segmentation.open_data(args)
        config = resolve_model_data_config(backbone_of(model))
        _, judge = train_segmentation.transforms(args, config, len(classes))
        task = train_segmentation.Segmentation(classes, _window(args))
    if isinstance(train, Shards):
        raise TrainingError("expected a run on scenes, a folder or a data set, got one on shards")
    return task, train, val, judge


def _window(args: argparse.Namespace) -> tuple[int, int]:
    return args.img_size[0], args.img_size[-1]


@torch.inference_mode()
def judge_all(models: Mapping[str, nn.Module], task: Task, batches: Any) -> dict[str, float]:
    """What training calls best, of every model."""
    metrics = {name: task.metrics() for name in models}
    for batch in tqdm(batches, "judging"):
        for name, model in models.items():
            metrics[name].update(*task.predict(model, batch))
    return {name: task.scalars(own.compute())[task.best] for name, own in metrics.items()}


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    """What the command line says."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("run", type=Path, help="folder of a run, what --out of training was")
    parser.add_argument(
        "--calibration-images", type=int, default=64, help="pictures to calibrate with"
    )
    parser.add_argument("--keep-float", nargs="+", default=[], help="depthwise, ends or both")
    parser.add_argument("--out", type=Path, help="folder of the files; default: RUN/onnx")
    return parser.parse_args(words)


def run(args: argparse.Namespace) -> dict[str, float]:
    """Quantise, judge, and print a table.

    Returns:
        What training calls best, by way of computing it.
    """
    model, told = load_run(args.run)
    task, train, val, prepare = task_of(model, told)
    if inserted_modules(backbone_of(model)):
        tc.fold_(backbone_of(model))
    size = told.img_size or resolve_model_data_config(backbone_of(model))["input_size"][1:]
    size = size[0], size[-1]
    chosen = Prepared(train, prepare, args.calibration_images)
    images = torch.stack([center_crop(image, list(size)) for image, *_ in chosen])
    out = args.out or args.run / "onnx"
    out.mkdir(parents=True, exist_ok=True)
    files = {"onnx float32": out / "float32.onnx", "onnx int8": out / "int8.onnx"}
    tc.export(model, files["onnx float32"], input_size=images.shape[1:])
    report = tc.export(
        model, files["onnx int8"], input_size=images.shape[1:], calibration=images,
        keep_float=args.keep_float,
    )  # fmt: skip
    print(report)
    models = {"torch float32": model}
    for how in ("int8_weight_only", "int8_dynamic"):
        models[f"torchao {how}"] = copy.deepcopy(model)
        tc.quantize_(models[f"torchao {how}"], how)
    models |= {name: OnnxModel(path) for name, path in files.items()}
    of_one_size = told.data is None or told.task == "classification"
    batches = DataLoader(Prepared(val, prepare), told.batch_size if of_one_size else 1)
    found = judge_all(models, task, batches)
    print(f"{'':24} {'MiB':>6} {task.best:>7} {'points':>7}")
    for name, value in found.items():
        size = f"{files[name].stat().st_size / 2**20:.2f}" if name in files else ""
        print(f"{name:24} {size:>6} {value:7.2%} {100 * (value - found['torch float32']):+7.2f}")
    return found


if __name__ == "__main__":
    with told_in_one_line():
        run(parse())
