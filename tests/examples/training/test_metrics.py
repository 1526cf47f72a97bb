"""Metrics beside scikit-learn's."""

import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score, jaccard_score, top_k_accuracy_score
from train_classification import Classification
from train_segmentation import Segmentation

NAMES = tuple("abcdefg")


@pytest.mark.parametrize("absent", [(), (3,), (0, 5)])
@pytest.mark.parametrize("seed", range(3))
def test_segmentation_is_judged_as_by_scikit_learn(absent, seed):
    rng = torch.Generator().manual_seed(seed)
    task = Segmentation(NAMES, (8, 8))
    metrics = task.metrics()
    present = torch.tensor([i for i in range(len(NAMES)) if i not in absent])
    targets, predictions = [], []
    for batch in range(4):
        own = present[torch.arange(len(present)) != batch]  # each batch lacks another class
        target = own[torch.randint(len(own), (2, 9, 11), generator=rng)].to(torch.uint8)
        predicted = present[torch.randint(len(present), (2, 9, 11), generator=rng)]
        predicted = torch.where(torch.rand(2, 9, 11, generator=rng) < 0.5, target.long(), predicted)
        target[torch.rand(2, 9, 11, generator=rng) < 0.2] = 255
        metrics.update(predicted, target)
        targets.append(target.flatten())
        predictions.append(predicted.flatten())
    found = task.scalars(metrics.compute())

    target, predicted = torch.cat(targets).numpy(), torch.cat(predictions).numpy()
    counted = target != 255
    target, predicted = target[counted], predicted[counted]
    each = jaccard_score(target, predicted, labels=range(7), average=None, zero_division=0)
    for name, value in zip(NAMES, each, strict=True):
        assert found[f"iou/{name}"] == pytest.approx(value, abs=1e-6)
    seen = [i for i in range(7) if i not in absent]
    assert found["miou"] == pytest.approx(each[seen].mean(), abs=1e-6)
    assert found["accuracy"] == pytest.approx(accuracy_score(target, predicted), abs=1e-6)


@pytest.mark.parametrize("seed", range(3))
def test_classification_is_judged_as_by_scikit_learn(seed):
    rng = torch.Generator().manual_seed(seed)
    task = Classification(NAMES, None, 0.0)
    metrics = task.metrics()
    labels = torch.randint(5, (60,), generator=rng)  # two classes are absent
    logits = torch.randn(60, 7, generator=rng)
    for part, own in zip(logits.split(16), labels.split(16), strict=True):
        metrics.update(part, own)
    found = task.scalars(metrics.compute())
    expected = {k: top_k_accuracy_score(labels, logits, k=k, labels=range(7)) for k in (1, 5)}
    assert found == pytest.approx({"top1": expected[1], "top5": expected[5]}, abs=1e-6)


def test_pixels_that_are_ignored_have_no_loss():
    task = Segmentation(NAMES, (4, 4))
    logits = torch.randn(2, 7, 4, 4, requires_grad=True)
    masks = torch.randint(7, (2, 4, 4), dtype=torch.uint8)
    masks[0, :2] = 255
    total, count = task.loss(lambda images: logits, (torch.zeros(2, 3, 4, 4), masks))
    assert count == 24
    total.backward()
    assert not logits.grad[0, :, :2].any()
    own = torch.nn.functional.log_softmax(logits.detach().double(), 1)
    expected = sum(
        -own[b, int(masks[b, y, x]), y, x]
        for b, y, x in np.ndindex(2, 4, 4)
        if masks[b, y, x] != 255
    )
    assert float(total.detach()) == pytest.approx(float(expected), rel=1e-5)


def test_a_batch_of_nothing_but_ignored_pixels_is_zero():
    task = Segmentation(NAMES, (4, 4))
    masks = torch.full((1, 4, 4), 255, dtype=torch.uint8)
    total, count = task.loss(lambda x: torch.randn(1, 7, 4, 4), (torch.zeros(1, 3, 4, 4), masks))
    assert (float(total), int(count)) == (0.0, 0)
