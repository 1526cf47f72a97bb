"""The training scripts, run in this process on scenes and models that take a second."""

import io
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

EXAMPLES = Path(__file__).parents[3] / "examples"

TINY = [
    *("--img-size", "32", "--scenes", "64", "--batch-size", "16", "--workers", "0"),
    *("--epochs", "2", "--lr", "1e-3", "--log-every", "2"),
    *(f"--model-arg={a}" for a in ("patch_size=8", "embed_dim=32", "depth=4", "num_heads=2")),
]


@pytest.fixture
def train(tmp_path, forget_accelerator):
    """Runs ``classification`` or ``segmentation`` and gives the folder of the run."""
    import train_classification
    import train_segmentation

    scripts = {"classification": train_classification, "segmentation": train_segmentation}

    def run(task, *words, out="run", tiny=TINY):
        script = scripts[task]
        folder = tmp_path / out
        try:
            script.run(script.parse([*tiny, *words, "--out", str(folder)]))
        finally:
            forget_accelerator()
        return folder

    return run


@pytest.fixture
def start(tmp_path):
    """Starts a script as a process of its own, or as several that train together.

    What a failed test leaves running ends with it.
    """
    started = []

    def run(script, *words, processes=1, out="run", threads=1):
        env = {**os.environ, "OMP_NUM_THREADS": str(threads), "CUDA_VISIBLE_DEVICES": ""}
        together = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        command = [sys.executable, *(together if processes > 1 else []), str(EXAMPLES / script)]
        started.append(subprocess.Popen(
            [*command, *words, "--out", str(tmp_path / out)],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env,
        ))  # fmt: skip
        return started[-1]

    yield run
    for process in started:
        process.kill()
        process.communicate()


@pytest.fixture
def tiny():
    """Options of a ViT of four small blocks and of eight steps."""
    return TINY


@pytest.fixture
def pictures(tmp_path):
    """Makes a folder of noise pictures per class, in two splits; red ones are of the second."""

    def make(classes=("cat", "dog"), count=8, size=(40, 36)):
        rng = np.random.default_rng(0)
        root = tmp_path / "pictures"
        for split in ("train", "val"):
            for number, name in enumerate(classes):
                folder = root / split / name
                folder.mkdir(parents=True)
                for index in range(count):
                    pixels = rng.integers(0, 200, (*size, 3), dtype=np.uint8)
                    pixels[..., 0] = 250 * number
                    Image.fromarray(pixels).save(folder / f"{index}.png")
        return root

    return make


@pytest.fixture
def masked(tmp_path):
    """Makes ``{train,val}/{images,masks}`` of several sizes, red where the mask is 1."""

    def make(count=6, size=(40, 36)):
        rng = np.random.default_rng(0)
        root = tmp_path / "masked"
        for split in ("train", "val"):
            for part in ("images", "masks"):
                (root / split / part).mkdir(parents=True)
            for index in range(count):
                height, width = size[0] + 3 * index, size[1] + index
                squares = rng.random((height // 8 + 1, width // 8 + 1)) < 0.4
                ids = np.kron(squares, np.ones((8, 8)))[:height, :width].astype(np.uint8)
                pixels = rng.integers(0, 200, (height, width, 3), dtype=np.uint8)
                pixels[..., 0] = 250 * ids
                ids[0] = 255
                Image.fromarray(pixels).save(root / split / "images" / f"{index}.jpg")
                Image.fromarray(ids).save(root / split / "masks" / f"{index}.png")
        return root

    return make


@pytest.fixture
def write_shards():
    """Writes a WebDataset; the red of every picture is its number in the split."""

    def write(root, split, shards, count, target):
        for shard in range(shards):
            with tarfile.open(root / f"{split}-{shard}.tar", "w") as tar:
                for index in range(count):
                    number = shard * count + index
                    parts = {"png": np.full((20, 24, 3), number), target: number % 2}
                    if target == "mask.png":
                        parts[target] = np.full((20, 24), number % 2)
                    for name, content in parts.items():
                        file = io.BytesIO()
                        if isinstance(content, int):
                            file.write(str(content).encode())
                        else:
                            Image.fromarray(content.astype(np.uint8)).save(file, "png")
                        info = tarfile.TarInfo(f"{number:05d}.{name}")
                        info.size = file.tell()
                        file.seek(0)
                        tar.addfile(info, file)

    return write
