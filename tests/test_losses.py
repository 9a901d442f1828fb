"""The loss: nnU-Net's own where the target is one-hot, and by hand where it is soft."""

import math

import pytest
import torch
from nnunetv2.training.loss.compound_losses import DC_and_CE_loss
from nnunetv2.training.loss.deep_supervision import DeepSupervisionWrapper
from nnunetv2.training.loss.dice import MemoryEfficientSoftDiceLoss
from torch.nn.functional import one_hot

from cotrain.losses import DiceAndSoftCrossEntropy

SHAPES = {"3d": (2, 3, 4, 8, 8), "2d": (2, 3, 8, 8)}


def stock_loss(*, batch_dice):
    return DC_and_CE_loss(
        {"batch_dice": batch_dice, "smooth": 1e-5, "do_bg": False, "ddp": False},
        {},
        weight_ce=1,
        weight_dice=1,
        dice_class=MemoryEfficientSoftDiceLoss,
    )


def labels_in_blocks(shape):
    """Return labels `(B, 1, ...)` that are constant in blocks of four voxels along each axis."""
    batch, classes, *size = shape
    blocks = torch.randint(classes, (batch, 1, *(length // 4 for length in size)))
    for axis in range(2, blocks.ndim):
        blocks = blocks.repeat_interleave(4, axis)
    return blocks


def hot(labels, classes):
    return one_hot(labels[:, 0].long(), classes).movedim(-1, 1).float()


@pytest.mark.parametrize("batch_dice", [False, True])
@pytest.mark.parametrize("dimensions", ["2d", "3d"])
def test_equals_nnunets_loss_for_one_hot_targets(dimensions, batch_dice):
    torch.manual_seed(0)
    shape = SHAPES[dimensions]
    logits, labels = torch.randn(shape), torch.randint(shape[1], (shape[0], 1, *shape[2:]))
    ours = DiceAndSoftCrossEntropy(batch_dice=batch_dice)(logits, hot(labels, shape[1]))
    torch.testing.assert_close(ours, stock_loss(batch_dice=batch_dice)(logits, labels))


@pytest.mark.parametrize("dimensions", ["2d", "3d"])
def test_deep_supervision_equals_nnunets_where_pooling_does_not_mix_labels(dimensions):
    torch.manual_seed(0)
    shape = SHAPES[dimensions]
    labels = labels_in_blocks(shape)
    every = [labels[(..., *[slice(None, None, step)] * (len(shape) - 2))] for step in (1, 2, 4)]
    logits = [torch.randn(shape[0], shape[1], *each.shape[2:]) for each in every]
    # 1, 1/2 and 0 for the coarsest, divided by their sum.
    stock = DeepSupervisionWrapper(stock_loss(batch_dice=True), [2 / 3, 1 / 3, 0])(logits, every)
    ours = DiceAndSoftCrossEntropy(batch_dice=True)(logits, hot(labels, shape[1]))
    torch.testing.assert_close(ours, stock)


def test_a_single_output_in_a_list_counts_in_full():
    torch.manual_seed(0)
    logits, labels = torch.randn(SHAPES["3d"]), labels_in_blocks(SHAPES["3d"])
    loss = DiceAndSoftCrossEntropy(batch_dice=False)
    torch.testing.assert_close(loss([logits], hot(labels, 3)), loss(logits, hot(labels, 3)))


def test_soft_targets_are_averaged_onto_coarser_outputs():
    loss = DiceAndSoftCrossEntropy(batch_dice=True)
    fine = torch.zeros(1, 2, 1, 2, 2)
    foreground = torch.tensor([[1.0, 0.5], [0.5, 0.0]])
    target = torch.stack([1 - foreground, foreground])[None, :, None]
    coarse = torch.tensor([0.0, 1.0]).reshape(1, 2, 1, 1, 1)
    # The four voxels average to one half of foreground.
    pooled = torch.full((1, 2, 1, 1, 1), 0.5)
    expected = 2 / 3 * loss(fine, target) + 1 / 3 * loss(coarse, pooled)
    torch.testing.assert_close(loss([fine, coarse, coarse], target), expected)


def test_soft_target_by_hand():
    # Two voxels, foreground wanted 0.75 and 0.25, predicted 0.5 and 0.5.
    target = torch.tensor([[[[0.25, 0.75]], [[0.75, 0.25]]]])
    loss = DiceAndSoftCrossEntropy(batch_dice=False)(torch.zeros(1, 2, 1, 2), target)
    dice = (2 * (0.5 * 0.75 + 0.5 * 0.25) + 1e-5) / (1 + 1 + 1e-5)
    assert loss.item() == pytest.approx(-dice + math.log(2))


def test_cross_entropy_with_a_soft_target_is_least_where_the_prediction_is_the_target():
    loss = DiceAndSoftCrossEntropy(batch_dice=False)
    target = torch.tensor([0.7, 0.2, 0.1]).reshape(1, 3, 1, 1)

    def cross_entropy(logits):
        return loss(logits, target) - loss.dice(logits, target)

    at_target = target.log().requires_grad_()
    least = cross_entropy(at_target)
    # The target's own entropy, which the paper's KL divergence leaves out.
    assert least.item() == pytest.approx(-(target * target.log()).sum().item())
    least.backward()
    torch.testing.assert_close(at_target.grad, torch.zeros_like(at_target), atol=1e-6, rtol=0)
    for other in ([0.6, 0.3, 0.1], [0.98, 0.01, 0.01]):
        assert cross_entropy(torch.tensor(other).log().reshape(1, 3, 1, 1)) > least


def test_logits_of_an_autocast_network_are_scored_in_float32():
    logits = torch.randn(1, 2, 4, 4, dtype=torch.bfloat16)
    target = torch.full((1, 2, 4, 4), 0.5)
    loss = DiceAndSoftCrossEntropy(batch_dice=False)(logits, target)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(
        loss, DiceAndSoftCrossEntropy(batch_dice=False)(logits.float(), target)
    )
