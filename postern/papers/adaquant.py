"""Quantising layer by layer from a few images, with bits given out by an integer programme."""

from datetime import date

from postern.claims import Paper

PAPER = Paper(
    slug="adaquant",
    title="Improving Post Training Neural Quantization: Layer-wise Calibration and Integer Programming",
    date=date(2020, 6, 14),
    arxiv="2006.10518",
    authors=5,
    family="quantize",
    summary=(
        "Quantising a trained network below 8 bits from a few hundred unlabelled images invites over-fitting. "
        "AdaQuant optimises each layer alone: scales, bias and a small change of the weights such that the "
        "quantised layer reproduces the original output. An integer programme gives each layer its bits under a "
        "budget, and batch-norm statistics and biases are tuned afterwards. A light pipeline does without "
        "back-propagation."
    ),
    reported=(
        "Less than 1 % degradation for ResNet-50 on ImageNet with 4-bit weights and activations in all but the "
        "smallest two layers (abstract).",
        "ResNet-50 at 13 % of its size in 32 bits with less than 1 % loss, by mixing 8 and 4 bits (repository).",
    ),
    code="itayhubara/CalibTIP",
)
