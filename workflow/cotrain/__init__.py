"""Co-training of a pretrained 2D and a 3D segmentation network through pseudo-masks (M&N)."""

__version__ = "0.1.0"
