"""The loss for true and soft labels alike: in, logits and class probabilities; out, a scalar."""

import torch
from nnunetv2.training.loss.dice import MemoryEfficientSoftDiceLoss
from torch import nn
from torch.nn.functional import adaptive_avg_pool2d, adaptive_avg_pool3d, cross_entropy


class DiceAndSoftCrossEntropy(nn.Module):
    """nnU-Net's soft Dice (foreground) plus cross-entropy, with probabilities as target.

    The cross-entropy equals the paper's KL divergence up to the target's own entropy, which has no
    gradient. For one-hot targets the loss of the finest output is nnU-Net's stock one; coarser ones
    differ at borders, where nnU-Net takes the nearest voxel's label.

    forward: logits `(B, K, ...)` or a list of them from fine to coarse (deep supervision); target
    `(B, K, ...)` float32 on the finest grid, averaged down to each coarser one. Deep supervision
    weighs the outputs 1, 1/2, 1/4 ... with 0 for the coarsest, normalised, as nnU-Net does.

    ddp: the batch is divided among the processes of torch's group; batch Dice is over all of it.
    """

    def __init__(self, *, batch_dice: bool, ddp: bool = False) -> None:
        super().__init__()
        # DDP waits for the gradient of each output, also of the coarsest; nnU-Net's number.
        self.least_weight = 1e-6 if ddp else 0
        self.dice = MemoryEfficientSoftDiceLoss(
            apply_nonlin=nn.Softmax(dim=1),
            batch_dice=batch_dice,
            do_bg=False,
            smooth=1e-5,
            ddp=ddp,
        )

    def forward(self, logits: torch.Tensor | list[torch.Tensor], target: torch.Tensor):
        if isinstance(logits, torch.Tensor):
            return self._one_scale(logits, target)
        weights = [1 / 2**i for i in range(len(logits))]
        if len(weights) > 1:
            weights[-1] = self.least_weight
        pool = adaptive_avg_pool3d if target.ndim == 5 else adaptive_avg_pool2d
        loss = logits[0].new_zeros((), dtype=torch.float32)
        for weight, each in zip(weights, logits, strict=True):
            if weight:
                smaller = target if each.shape == target.shape else pool(target, each.shape[2:])
                loss = loss + weight / sum(weights) * self._one_scale(each, smaller)
        return loss

    def _one_scale(self, logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        logits = logits.float()
        return self.dice(logits, target) + cross_entropy(logits, target)
