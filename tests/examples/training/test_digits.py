"""Digit scenes: what they promise."""

import numpy as np
import pytest
from sklearn.datasets import load_digits
from training import digits
from training.digits import MASK_CLASSES, DigitScenes
from training.errors import TrainingError

SPLITS = ("train", "val", "test")


def test_the_same_index_is_the_same_scene():
    one, other = (DigitScenes("train", length=8)[5] for _ in range(2))
    assert one.label == other.label
    assert one.image.tobytes() == other.image.tobytes()
    assert one.mask.tobytes() == other.mask.tobytes()
    assert DigitScenes("train", length=8, seed=1)[5].image.tobytes() != one.image.tobytes()


def test_scenes_are_kept_as_long_as_there_is_room(monkeypatch):
    monkeypatch.setattr(digits, "_KEPT", 2 * 4 * 32 * 32)
    scenes = DigitScenes("train", size=(32, 32), length=8)
    first = [scenes[index] for index in range(8)]
    assert [scenes[index] is first[index] for index in range(8)] == [True] * 2 + [False] * 6
    for index, scene in enumerate(first):
        assert scenes[index].image.tobytes() == scene.image.tobytes()
        assert scenes[index].boxes == scene.boxes


def test_splits_share_neither_digits_nor_photographs():
    strokes = {split: {s.tobytes() for s in digits._digits(split)[0]} for split in SPLITS}
    assert sum(len(digits._digits(split)[0]) for split in SPLITS) == len(load_digits().target)
    photos = {split: set(digits._PHOTOS[split]) for split in SPLITS}
    for first, second in (("train", "val"), ("train", "test"), ("val", "test")):
        assert not photos[first] & photos[second]
        assert not strokes[first] & strokes[second]


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("size", [(64, 64), (32, 50)])
def test_the_class_is_the_digit_that_covers_most(split, size):
    right = 0
    scenes = DigitScenes(split, size=size, length=60)
    for scene in (scenes[i] for i in range(60)):
        assert scene.image.size == scene.mask.size == size[::-1]
        assert scene.image.mode == "RGB"
        ids, counts = np.unique(np.array(scene.mask), return_counts=True)
        assert set(ids) <= set(range(len(MASK_CLASSES)))
        assert scene.label + 1 in ids
        covered = {i: n for i, n in zip(ids, counts, strict=True) if i}
        right += max(covered, key=covered.__getitem__) == scene.label + 1
    assert right >= 55  # a 1 is thin


def test_digits_are_brighter_than_what_is_behind_them():
    for index in range(20):
        scene = DigitScenes("train", length=20)[index]
        pixels, ids = np.array(scene.image).max(2), np.array(scene.mask)
        assert pixels[ids > 0].mean() > 180
        assert pixels[ids == 0].mean() < 130


def test_every_class_and_several_digits_appear():
    scenes = [DigitScenes("train", length=200)[i] for i in range(200)]
    assert {scene.label for scene in scenes} == set(range(10))
    several = [len(np.unique(np.array(scene.mask))) > 2 for scene in scenes]
    assert 0.5 < np.mean(several) < 1


def test_what_is_no_scene_is_told():
    with pytest.raises(TrainingError, match="expected split train, val or test, got 'all'"):
        DigitScenes("all")  # pyright: ignore[reportArgumentType]
    with pytest.raises(TrainingError, match=r"16x16 or more, got 8192 of \(8, 64\)"):
        DigitScenes("train", size=(8, 64))
    with pytest.raises(IndexError, match="scene 3 of 3"):
        DigitScenes("train", length=3)[3]


def test_the_sheet_shows_scenes_above_their_masks(tmp_path):
    sheet = digits._sheet("val", rows=1, cols=2)
    scene = DigitScenes("val", size=(96, 96), length=2)[1]
    assert sheet.size == (192, 192)
    assert np.array_equal(np.array(sheet)[:96, 96:], np.array(scene.image))
    below = np.array(sheet)[96:, 96:]
    assert len(np.unique(below.reshape(-1, 3), axis=0)) == len(np.unique(np.array(scene.mask)))
