"""2D segmentation networks over timm encoders: in, slices of any size; out, a logit for each label.

nnU-Net builds `TimmSegmentationNetwork` from a plans file: the configuration's
`network_class_name` is `cotrain.networks.TimmSegmentationNetwork` and its `arch_kwargs` are the
keyword-only arguments below. Pretrained weights are no business of the constructor: a network
that is rebuilt for inference gets all its weights from its checkpoint, a network that starts
training gets them through `load_encoder`, or not at all.

Known to work, because `tests/test_networks.py` holds each to the same contract:

| encoder                      | kind                     | decoder |
|------------------------------|--------------------------|---------|
| tf_efficientnet_lite0        | convolutions             | Unet    |
| pvt_v2_b0                    | hierarchical transformer | Unet    |
| vit_tiny_patch16_224         | plain ViT, any size      | DPT     |
| vit_small_patch16_dinov3     | plain ViT, rotary        | DPT     |

A ViT with patches of 14 pixels (DINOv2) does not work: DPT halves and doubles a grid of 32 pixels.
Nor does an encoder built for one size of image (Swin): slices come in any.
"""

from typing import Literal

import segmentation_models_pytorch as smp
import torch
from timm.models import adapt_input_conv
from timm.models._features import FeatureGetterNet
from torch import Tensor, nn
from torch.nn import functional

from cotrain.errors import InputError
from cotrain.weights import check_encoder, few, timm_encoder_holding

# Five halvings: the coarsest scale of every smp decoder. DPT too needs it, although a ViT's own
# stride is 16, because it halves the ViT's grid once and doubles it again.
COARSEST_STRIDE = 32


class TimmSegmentationNetwork(nn.Module):
    """A timm encoder under a segmentation-models-pytorch decoder.

    Maps `(B, C, Y, X)` float images to `(B, num_classes, Y, X)` logits, for any Y and X.

    Args:
        input_channels: channels of the image; 3 are not needed, the stem is adapted when weights
            are loaded.
        num_classes: labels including the background.
        deep_supervision: must be False, these decoders have one output.
        encoder: timm's name, with or without the tag of its weights.
        decoder: an architecture of smp, e.g. Unet, UnetPlusPlus, FPN, UPerNet, Segformer; DPT
            for plain vision transformers.
        adaptation: `full` trains everything; `lora` trains low-rank updates of the encoder's dense
            layers (Hu et al. 2021, arXiv 2106.09685) and the decoder; `frozen` the decoder alone.
        lora_rank: rank of the updates; 64 is the paper's (arXiv 2509.15167) for SegFormer-B2.
        adjacent_slices: n, slices on each side that come as further channels: C is
            `input_channels * (1 + 2 * n)`, all slices of the first channel first.

    Raises InputError for an argument that cannot be met.
    """

    def __init__(
        self,
        input_channels: int,
        num_classes: int,
        deep_supervision: bool = False,
        *,
        encoder: str = "tf_efficientnet_lite0",
        decoder: str = "Unet",
        adaptation: Literal["full", "lora", "frozen"] = "full",
        lora_rank: int = 64,
        adjacent_slices: int = 0,
    ) -> None:
        super().__init__()
        if deep_supervision:
            raise InputError(
                f"Deep supervision was asked of a {decoder} over {encoder}, which has one output; "
                "train it with a trainer whose enable_deep_supervision is False."
            )
        check_encoder(encoder)
        self.encoder_name = encoder
        self.input_channels = input_channels * (1 + 2 * adjacent_slices)
        self.adaptation = adaptation
        self.model = self._smp_model(decoder, num_classes)
        if adaptation != "full":
            self.model.encoder.requires_grad_(False)
        if adaptation == "lora":
            self._inject_lora(lora_rank)
        self.train()

    def _smp_model(self, decoder: str, num_classes: int) -> nn.Module:
        """Return smp's model with random weights, without layers that no output depends on."""
        plain_vit = decoder.lower() == "dpt"
        # A plain ViT's position embedding is interpolated to each input.
        options = {"dynamic_img_size": True} if plain_vit else {}
        try:
            model = smp.create_model(
                decoder,
                encoder_name=f"tu-{self.encoder_name}",
                encoder_weights=None,
                in_channels=self.input_channels,
                classes=num_classes,
                **options,
            )
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(
                f"segmentation_models_pytorch cannot join the encoder {self.encoder_name} and the "
                f"decoder {decoder} ({error}); plain vision transformers take DPT, "
                "all others e.g. Unet."
            ) from error
        if COARSEST_STRIDE % model.encoder.output_stride:
            raise InputError(
                f"The encoder {self.encoder_name} has patches of {model.encoder.output_stride} "
                f"pixels; choose one whose patches divide {COARSEST_STRIDE}, e.g. 16."
            )
        if plain_vit:
            # DPT reads blocks, so a ViT's last norm and head would be parameters without gradient
            model.encoder.model.prune_intermediate_layers(1, prune_norm=True, prune_head=True)
        return model

    def _inject_lora(self, rank: int) -> None:
        """Put a trainable low-rank update beside each dense layer of the encoder."""
        from peft import LoraConfig, inject_adapter_in_model
        from peft.tuners.lora import LoraLayer

        encoder = self.model.encoder
        targets = [name for name, layer in encoder.named_modules() if takes_lora(layer)]
        if not targets:
            raise InputError(
                f"The encoder {self.encoder_name} has no plain Linear or dense Conv2d layer for "
                "LoRA; choose the adaptation full or frozen."
            )
        # alpha = rank: the update is not rescaled, so a changed rank changes capacity alone
        config = LoraConfig(r=rank, lora_alpha=rank, target_modules=targets)
        inject_adapter_in_model(config, encoder)

        adapted = {
            name: layer for name, layer in encoder.named_modules() if isinstance(layer, LoraLayer)
        }
        called: set[str] = set()
        hooks = [
            layer.register_forward_hook(lambda *_, name=name: called.add(name))
            for name, layer in adapted.items()
        ]
        self.eval()
        with torch.no_grad():
            self(torch.zeros(1, self.input_channels, 64, 64))
        for hook in hooks:
            hook.remove()
        if uncalled := adapted.keys() - called:
            raise InputError(
                f"LoRA cannot adapt the encoder {self.encoder_name}: {len(uncalled)} of its layers "
                f"({few(uncalled)}) are used without being called, so their updates would do "
                "nothing; choose the adaptation full or frozen, or another encoder."
            )

    @property
    def decoder(self) -> nn.Module:
        """smp's decoder, here because nnU-Net's trainer sets `network.decoder.deep_supervision`."""
        return self.model.decoder

    def train(self, mode: bool = True) -> "TimmSegmentationNetwork":
        """Set the mode; an encoder whose weights are not trained stays in evaluation mode.

        So a frozen encoder's features are always those of pretraining. With LoRA too: the updates
        are learnt against the base as it was pretrained, and running statistics over batches of a
        few slices would move that base, although its weights are called frozen.
        """
        super().train(mode)
        if self.adaptation != "full":
            self.model.encoder.eval()
        return self

    def forward(self, images: Tensor) -> Tensor:
        """Return `(B, num_classes, Y, X)` logits of `(B, C, Y, X)` images.

        The lower right is padded to a size the encoder takes, and cut off again. The border is
        repeated: zeros would draw an edge where the anatomy goes on, and a reflection cannot be
        longer than the image.
        """
        height, width = images.shape[-2:]
        padding = (0, -width % COARSEST_STRIDE, 0, -height % COARSEST_STRIDE)
        if any(padding):
            images = functional.pad(images, padding, mode="replicate")
        return self.model(images)[..., :height, :width]

    def load_encoder(self, tensors: dict[str, Tensor]) -> None:
        """Copy pretrained weights, under timm's names, into the encoder; LoRA's stay as they are.

        A stem for another number of channels is made from the pretrained one by timm's own
        `adapt_input_conv`.
        Raises InputError, before anything is changed, where one tensor has no counterpart.
        """
        donor = timm_encoder_holding(tensors, encoder=self.encoder_name)
        pretrained = donor.state_dict()
        if self.input_channels != 3:
            stems = donor.pretrained_cfg["first_conv"]
            for stem in (stems,) if isinstance(stems, str) else stems:
                name = f"{stem}.weight"
                pretrained[name] = adapt_input_conv(self.input_channels, pretrained[name])
        own = self._encoder_tensors(donor)
        unmatched = {
            name
            for name, tensor in own.items()
            if name not in pretrained or pretrained[name].shape != tensor.shape
        }
        if unmatched:
            raise InputError(
                f"{len(unmatched)} tensors of the encoder {self.encoder_name} ({few(unmatched)}) "
                "have no counterpart of the same shape in the pretrained weights, so they would "
                "start at random; choose another encoder or number of channels."
            )
        with torch.no_grad():
            for name, tensor in own.items():
                tensor.copy_(pretrained[name])

    def _encoder_tensors(self, donor: nn.Module) -> dict[str, Tensor]:
        """Return the encoder's own tensors, without LoRA's, by their names in timm's plain model.

        Walks through the modules, because two wrappers rename them: peft stands a layer around
        the base layer, and timm's feature extractors lift the stages out of their containers
        (`stages.0` becomes `stages_0`); `donor`, the plain model, tells which of them were lifted.
        """
        root = self.model.encoder.model
        if isinstance(root, FeatureGetterNet):
            root = root.model
        tensors = {}

        def collect(module: nn.Module, prefix: str) -> None:
            module = module.get_base_layer() if hasattr(module, "get_base_layer") else module
            for name, tensor in module.state_dict(keep_vars=True).items():
                if "." not in name:
                    tensors[prefix + name] = tensor
            for name, child in module.named_children():
                lifted = module is root and not hasattr(donor, name)
                name = ".".join(name.rsplit("_", 1)) if lifted else name
                collect(child, f"{prefix}{name}.")

        collect(root, "")
        return tensors


def takes_lora(layer: nn.Module) -> bool:
    """Whether peft's low-rank update repeats what `layer` does: dense, of a plain type.

    Exact types, because a subclass may pad in its own forward (timm's Conv2dSame, the stem of
    tf_ encoders), and no dilation (DeepLab): peft repeats neither. A depthwise convolution has
    so few weights that a low rank would save none.
    """
    if type(layer) is nn.Conv2d:
        return layer.groups == 1 and layer.dilation == (1, 1)
    return type(layer) is nn.Linear
