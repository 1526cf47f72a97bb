"""Where samples come from, and what is wrong with them."""

import contextlib
import io
import random
import tarfile

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import EpsImagePlugin, Image
from torchvision import tv_tensors
from training.errors import TrainingError
from training.loading import Augmented, EpochSampler, make_loader, read_picture
from training.masks import MaskedImages
from training.streams import Shards, Streamed


class Numbers:
    def __len__(self):
        return 23

    def __getitem__(self, index):
        return index


def noisy(sample):
    drawn = [random.random(), np.random.rand(), float(torch.rand(()))]
    return torch.tensor([sample, *drawn], dtype=torch.float64)


def batches(workers, epoch=1, start=0):
    sampler = EpochSampler(23, seed=7, group=5)
    sampler.begin(epoch, start)
    return [
        *make_loader(Augmented(Numbers(), noisy, (7, 0)), sampler, batch_size=5, workers=workers)
    ]


def test_samples_depend_on_seed_and_epoch_alone():
    torch.manual_seed(3)
    alone = batches(0)
    torch.manual_seed(4)
    beside = batches(2)
    assert torch.equal(torch.cat(alone), torch.cat(beside))
    assert len({*torch.cat(alone)[:, 1].tolist()}) == 20  # numbers of their own
    assert not torch.equal(torch.cat(alone), torch.cat(batches(0, epoch=2)))
    assert torch.equal(torch.cat(alone)[10:], torch.cat(batches(0, start=10)))


def test_global_generators_go_on_where_they_were():
    torch.manual_seed(3)
    random.seed(3)
    np.random.seed(3)
    expected = random.random(), np.random.rand(), torch.rand(())
    torch.manual_seed(3)
    random.seed(3)
    np.random.seed(3)
    batches(0)
    assert (random.random(), np.random.rand(), torch.rand(())) == expected


# --- pictures and masks ---


def test_a_folder_of_masks_is_read(masked):
    data = MaskedImages(masked(), "train", 2)
    assert len(data) == 6
    image, mask = data[2]
    assert isinstance(image, tv_tensors.Image)
    assert isinstance(mask, tv_tensors.Mask)
    assert image.shape == (3, 46, 38)
    assert mask.shape == (46, 38)
    assert mask.unique().tolist() == [0, 1, 255]
    assert (mask[0] == 255).all()
    assert image[0][mask == 1].float().mean() > image[0][mask == 0].float().mean() + 50


def save(path, pixels):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(pixels, np.uint8)).save(path)


PICTURE = np.zeros((4, 6, 3))


def test_oxford_pet_masks(tmp_path):
    save(tmp_path / "images" / "cat_1.jpg", PICTURE)
    save(tmp_path / "annotations" / "trimaps" / "cat_1.png", [[1, 2, 3, 1, 2, 3]] * 4)
    (tmp_path / "annotations" / "trainval.txt").write_text("cat_1 1 1 1\n")
    (tmp_path / "annotations" / "test.txt").write_text("")
    data = MaskedImages(tmp_path, "train")
    assert data.num_classes == 2
    assert data[0][1][0].tolist() == [1, 0, 255, 1, 0, 255]
    with pytest.raises(TrainingError, match=r"val of .* holds no pictures"):
        MaskedImages(tmp_path, "val")


def test_ade20k_masks(tmp_path):
    for split in ("training", "validation"):
        save(tmp_path / "images" / split / "one.jpg", PICTURE)
        save(tmp_path / "annotations" / split / "one.png", [[0, 1, 2, 150, 149, 3]] * 4)
    data = MaskedImages(tmp_path, "val")
    assert data.num_classes == 150
    assert data[0][1][0].tolist() == [255, 0, 1, 149, 148, 2]


def test_voc_masks(tmp_path):
    save(tmp_path / "JPEGImages" / "2007_1.jpg", PICTURE)
    palette = Image.fromarray(np.asarray([[0, 1, 20, 255, 5, 5]] * 4, np.uint8))
    palette.putpalette([7, 9, 11] * 256)
    (tmp_path / "SegmentationClass").mkdir()
    palette.save(tmp_path / "SegmentationClass" / "2007_1.png")
    lists = tmp_path / "ImageSets" / "Segmentation"
    lists.mkdir(parents=True)
    (lists / "train.txt").write_text("2007_1\n")
    data = MaskedImages(tmp_path, "train")
    assert data.num_classes == 21
    assert data[0][1][0].tolist() == [0, 1, 20, 255, 5, 5]


def cut_off(root):
    path = root / "train" / "images" / "0.jpg"
    path.write_bytes(path.read_bytes()[:400])


def drop_a_mask(root):
    (root / "train" / "masks" / "0.png").unlink()


def drop_a_picture(root):
    (root / "train" / "images" / "0.jpg").unlink()


def shrink_a_mask(root):
    save(root / "train" / "masks" / "0.png", np.zeros((3, 5)))


def raise_an_id(root):
    save(root / "train" / "masks" / "0.png", np.full((40, 36), 9))


def color_a_mask(root):
    save(root / "train" / "masks" / "0.png", np.zeros((40, 36, 3)))


def repeat_a_name(root):
    (root / "train" / "images" / "0.bmp").write_bytes(b"")


def empty_a_split(root):
    for path in (root / "train").rglob("*.*"):
        path.unlink()


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (cut_off, r"cannot read .*train/images/0.jpg: "),
        (drop_a_mask, r"train/images/0.jpg has no mask in .*train/masks"),
        (drop_a_picture, r"train/masks/0.png has no picture in .*train/images"),
        (shrink_a_mask, r"0.png and its picture differ in size \(width x height\): 36x40 and 5x3"),
        (raise_an_id, r"0.png has ids \[9\]; expected 0 to 1, or 255 for what is ignored"),
        (color_a_mask, r"0.png has pixels of kind RGB; expected one byte each"),
        (repeat_a_name, r"images/0.bmp and 0.jpg have one name: which is meant"),
        (empty_a_split, r"train of .* holds no pictures"),
    ],
)
def test_what_is_wrong_with_masks_is_told(train, masked, damage, told):
    root = masked()
    damage(root)
    with pytest.raises(TrainingError, match=told):
        train("segmentation", "--data", str(root), "--num-classes", "2", "--batch-size", "4")


def test_a_folder_of_no_known_layout_is_told(tmp_path):
    with pytest.raises(
        TrainingError, match=r"no layout that is known: expected one of .*train/masks"
    ):
        MaskedImages(tmp_path, "train", 2)


def test_masks_do_not_say_how_many_classes_there_are(masked):
    with pytest.raises(TrainingError, match="say --num-classes"):
        MaskedImages(masked(), "train")


@pytest.mark.parametrize("listed", ["../../secret", "/etc/secret"])
def test_a_list_of_names_leads_out_of_no_folder(tmp_path, listed):
    (tmp_path / "SegmentationClass").mkdir()
    lists = tmp_path / "ImageSets" / "Segmentation"
    lists.mkdir(parents=True)
    (lists / "train.txt").write_text(f"2007_000032\n\n{listed}\n")
    with pytest.raises(TrainingError, match=rf"train.txt lists {listed}; expected names without"):
        MaskedImages(tmp_path, "train")


# --- pictures that are not what they seem ---


def saved(kind, mode="RGB"):
    file = io.BytesIO()
    Image.new(mode, (40, 36)).save(file, kind)
    return file.getvalue()


def test_a_picture_that_would_fill_the_memory_is_not_read(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 600)
    with pytest.raises(TrainingError, match=r"cannot read it: .*decompression bomb"):
        read_picture(io.BytesIO(saved("PNG")), "it", "RGB")


def test_other_programs_are_not_run_for_a_picture(monkeypatch):
    def run(*args, **kwargs):
        raise AssertionError("Ghostscript was called")

    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", run)
    with pytest.raises(TrainingError, match="cannot read it: cannot identify image file"):
        read_picture(io.BytesIO(saved("EPS")), "it", "RGB")


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("count", [100, pytest.param(10_000, marks=pytest.mark.slow)])
def test_damaged_pictures_are_read_or_told(count):
    kinds = [("GIF", "P"), ("JPEG2000", "RGB"), ("PPM", "RGB"), ("TIFF", "F"), ("TIFF", "CMYK")]
    whole = [saved(*kind) for kind in [*kinds, ("PNG", "P"), ("JPEG", "L"), ("BMP", "1")]]

    @settings(max_examples=count, derandomize=True, database=None, deadline=None)
    @given(st.sampled_from(whole), st.data(), st.sampled_from(["RGB", None]))
    def check(data, drawn, mode):
        made = bytearray(data)
        for _ in range(drawn.draw(st.integers(1, 4))):
            at = drawn.draw(st.integers(0, len(made) - 1))
            end = drawn.draw(st.sampled_from([at + 1, at + 4, None]))
            made[at:end] = drawn.draw(st.binary(min_size=1, max_size=4))
        with contextlib.suppress(TrainingError):
            assert read_picture(io.BytesIO(bytes(made)), "it", mode).size

    check()


# --- shards ---


def test_a_command_is_no_shard(train, tmp_path, monkeypatch):
    command = f"pipe:touch {tmp_path}/ran #" + "{split}.tar"
    with pytest.raises(TrainingError, match="not what a command gives"):
        train("classification", "--data", command, "--num-classes", "2", "--samples", "8")
    monkeypatch.setenv("GOPEN_REWRITE", f"https://host=pipe:touch {tmp_path}/ran #")
    with pytest.raises(TrainingError, match="cannot read the shards"):
        next(Shards("https://host/{split}-0.tar", "val", is_mask=False).read(None))
    assert not (tmp_path / "ran").exists()


def a_shard(path, **parts):
    with tarfile.open(path, "w") as tar:
        for name, content in parts.items():
            info = tarfile.TarInfo(f"../../0.{name}")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


@pytest.mark.filterwarnings(
    "ignore:unclosed file:ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"
)
@pytest.mark.parametrize(
    ("parts", "kept", "told"),
    [
        ({"png": saved("PNG"), "cls": b"1"}, 700, "cannot read the shards"),
        ({"png": saved("PNG"), "cls": b"1"}, 0, "cannot read the shards"),
        ({"png": saved("PNG")}, None, "cannot read the shards"),
        ({"png": b"no", "cls": b"1"}, None, "cannot read"),
        ({"png": saved("PNG"), "cls": b"one"}, None, "is no class: b'one'"),
    ],
    ids=["cut off", "empty", "without a class", "no picture", "no number"],
)
def test_damaged_shards_are_told(tmp_path, parts, kept, told):
    path = tmp_path / "val-0.tar"
    a_shard(path, **parts)
    path.write_bytes(path.read_bytes()[:kept])
    shards = Shards(str(tmp_path / "{split}-0.tar"), "val", is_mask=False)
    with pytest.raises(TrainingError, match=told):
        [*shards.read(None)]


@pytest.mark.filterwarnings(
    "ignore:unclosed file:ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"
)
def test_members_of_a_shard_are_read_wherever_they_say_they_are(tmp_path):
    """Nothing is unpacked, so a path in an archive leads nowhere."""
    a_shard(tmp_path / "val-0.tar", png=saved("PNG"), cls=b"1")
    shards = Shards(str(tmp_path / "{split}-0.tar"), "val", is_mask=False)
    (sample,) = shards.read(None)
    assert sample[1] == 1
    assert [path.name for path in tmp_path.iterdir()] == ["val-0.tar"]


# webdataset closes its files when they are collected.
left_open = pytest.mark.filterwarnings(
    "ignore:unclosed file:ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"
)


def numbers(sample):
    return sample[0].getpixel((0, 0))[0], sample[1]


@left_open
def test_shards_to_be_judged_by_are_read_once_in_order(tmp_path, write_shards):
    write_shards(tmp_path, "val", 3, 4, "cls")
    shards = Shards(str(tmp_path / "{split}-{0..2}.tar"), "val", is_mask=False)
    found = [*Streamed(shards, numbers, None)]
    assert found == [(n, n % 2) for n in range(12)]


@left_open
def test_shards_to_train_on_are_shuffled_by_epoch_and_shared_out(
    tmp_path, monkeypatch, write_shards
):
    write_shards(tmp_path, "train", 4, 5, "cls")
    seen = {}
    for epoch in (0, 1):
        for rank in ("0", "1"):
            monkeypatch.setenv("RANK", rank)
            monkeypatch.setenv("WORLD_SIZE", "2")
            shards = Shards(str(tmp_path / "{split}-*.tar"), "train", is_mask=False, samples=20)
            stream = Streamed(shards, numbers, seed=1)
            stream.begin(epoch)
            iterator = iter(stream)
            seen[epoch, rank] = [next(iterator)[0] for _ in range(10)]
    for epoch in (0, 1):
        read = {n // 5 for n in seen[epoch, "0"]}, {n // 5 for n in seen[epoch, "1"]}
        assert not read[0] & read[1]  # no shard is read twice
    assert seen[0, "0"] != seen[1, "0"]
    assert seen[0, "0"] != sorted(seen[0, "0"])


@left_open
@pytest.mark.parametrize(
    ("task", "target"), [("classification", "cls"), ("segmentation", "mask.png")]
)
def test_shards_are_trained_on(train, tmp_path, task, target, write_shards):
    for split, count in (("train", 8), ("val", 5)):
        write_shards(tmp_path, split, 2, count, target)
    pattern = str(tmp_path / "{split}-{0..1}.tar")
    words = ["--data", pattern, "--num-classes", "2", "--samples", "32", "--workers", "1"]
    folder = train(task, *words, "--insert", "mix_ffn")
    assert (folder / "checkpoints" / "step-00000004").is_dir()


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (
            ["{0..1}.tar", "--num-classes", "2", "--samples", "8"],
            r"expected \{split\} in the pattern",
        ),
        (["{split}-*.tar", "--num-classes", "2", "--samples", "8"], "no shards match .*train-"),
        (["{split}-0.tar", "--num-classes", "2"], "say --num-classes, --samples"),
        (
            ["{split}-0.tar", "--num-classes", "2", "--samples", "32", "--workers", "2"],
            "1 shards are too few",
        ),
    ],
)
def test_what_is_wrong_with_shards_is_told(train, tmp_path, words, told, write_shards):
    data = str(tmp_path / words[0])
    with pytest.raises(TrainingError, match=told):
        train("classification", "--data", data, *words[1:])


# --- pictures of classes ---


@pytest.mark.parametrize("data", ["no/such/folder", "cats", "tfds/cats"])
def test_data_that_are_not_there_are_told(train, data):
    told = f"--data {data} is no folder; expected one, shards that end in .tar, or hfds/NAME"
    with pytest.raises(TrainingError, match=told):
        train("classification", "--data", data)


def test_a_folder_of_pictures_is_learned(train, pictures):
    folder = train("classification", "--data", str(pictures()), "--epochs", "4", "--lr", "3e-3",
                   "--img-size", "32", "--insert", "mix_ffn", "--batch-size", "8")  # fmt: skip
    import json

    history = json.loads((folder / "history.json").read_text())
    assert history[-1]["top1"] > 0.9  # red or not
    assert json.loads((folder / "settings.json").read_text())["classes"] == ["cat", "dog"]


def test_hugging_face_datasets_are_read(train, pictures, tmp_path):
    pytest.importorskip("datasets")
    folder = train(
        "classification", "--data", f"hfds/{pictures()}", "--splits", "train", "validation",
        "--num-classes", "2", "--batch-size", "8", "--data-root", str(tmp_path / "cache"),
    )  # fmt: skip
    assert (folder / "history.json").exists()


def cut_off_a_picture(root):
    path = root / "train" / "cat" / "0.png"
    path.write_bytes(path.read_bytes()[:200])


def drop_a_class(root):
    for path in (root / "val" / "dog").iterdir():
        path.unlink()
    (root / "val" / "dog").rmdir()


def drop_a_split(root):
    (root / "val").rename(root / "test")


def drop_all(root):
    for path in root.rglob("*.png"):
        path.unlink()


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (cut_off_a_picture, r"cannot read .*train/cat/0.png: "),
        (drop_a_class, r"classes that are in one split of .* only: \['dog'\]"),
        (drop_a_split, r"expected a folder .*val with a folder of pictures per class"),
        (drop_all, r"cannot read train of .*: Found 0 images"),
    ],
)
@pytest.mark.parametrize("workers", ["0", "1"])
def test_what_is_wrong_with_pictures_is_told(train, pictures, damage, told, workers):
    root = pictures()
    damage(root)
    with pytest.raises(TrainingError, match=told):
        train("classification", "--data", str(root), "--batch-size", "8", "--workers", workers)
