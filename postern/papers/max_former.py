"""Spiking networks lose high frequencies; pooling and convolution bring them back."""

from datetime import date

from postern.claims import Paper

PAPER = Paper(
    slug="max-former",
    title="Spiking Neural Networks Need High-Frequency Information",
    date=date(2025, 5, 24),
    arxiv="2505.18608",
    authors=8,
    family="spiking",
    summary=(
        "Spiking networks trail others in accuracy, and this paper blames not their binary signals but their "
        "neurons: leaky integration is a low-pass filter, and layers compound it. Replacing average by maximum "
        "pooling as the mixer of tokens helps a spiking transformer, the opposite of what ordinary vision "
        "transformers prefer. The cure is more maximum pooling in the patch embedding and depth-wise convolution "
        "in place of early attention. It concerns frugal vision models and the measurement of spectral bias."
    ),
    reported=(
        "CIFAR-100: maximum pooling as mixer 79.12 %, average pooling 76.73 %.",
        "CIFAR-100 with 6.60M parameters: Max-Former 82.65 %, MS-QKFormer 81.57 %; CIFAR-10: 97.04 and 96.84 %.",
        "ImageNet with 63.99M parameters and four steps: 82.39 % at 14.87 mJ; Spikformer 74.81 % at 21.48 mJ.",
        "Max-ResNet-18, four steps: CIFAR-10 97.17 %, CIFAR-100 83.06 %; MS-ResNet 94.92 and 76.41 % by another "
        "recipe.",
    ),
    code="bic-L/MaxFormer",
)
