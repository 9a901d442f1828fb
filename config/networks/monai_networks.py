"""3D networks of MONAI for `network_3d.architecture`; needs `pip install monai==1.5.1`.

A class is called as nnU-Net calls its own: with the numbers of channels and classes, the arguments
of the settings, and `deep_supervision`, which these networks do not have. This file goes along
with every model, and is all that stock nnU-Net needs beside MONAI to run it.
"""

from monai.networks.nets import BasicUNet, SegResNet, SwinUNETR


class SegResNet3D(SegResNet):
    """Residual encoder, no skip concatenation (Myronenko 2018); patches divisible by 8."""

    def __init__(self, input_channels, num_classes, deep_supervision=False, **arguments):
        super().__init__(
            spatial_dims=3, in_channels=input_channels, out_channels=num_classes, **arguments
        )


class SwinUNETR3D(SwinUNETR):
    """Windowed transformer as encoder (Hatamizadeh et al. 2022); patches divisible by 32."""

    def __init__(self, input_channels, num_classes, deep_supervision=False, **arguments):
        super().__init__(
            spatial_dims=3, in_channels=input_channels, out_channels=num_classes, **arguments
        )


class PlainUNet3D(BasicUNet):
    """Plain U-Net of five scales, as peers of the paper use it; patches divisible by 16."""

    def __init__(self, input_channels, num_classes, deep_supervision=False, **arguments):
        super().__init__(
            spatial_dims=3, in_channels=input_channels, out_channels=num_classes, **arguments
        )
