"""Linear attention that does not forget the length of the query."""

from datetime import date

from postern.claims import Paper

PAPER = Paper(
    slug="nalaformer",
    title="NaLaFormer: Norm-Aware Linear Attention for Transformer Models",
    date=date(2025, 6, 26),
    arxiv="2506.21137",
    authors=6,
    family="attention",
    summary=(
        "In softmax attention a long query gives a sharp distribution; the normaliser of linear attention cancels "
        "that length, and a ReLU throws away what negative coordinates have in common. NaLaFormer splits vectors "
        "into norm and direction. The norm of the query becomes the exponent of the coordinates of its direction, "
        "which survives normalisation, and a cosine-sine pair keeps each sign, so that equal signs interact and "
        "opposite ones do not."
    ),
    reported=(
        "Up to 4.2 % better on vision and language tasks (abstract).",
        "ImageNet-1k at 224 pixels, 300 epochs: 79.1, 82.6, 84.3, 85.2 and 85.7 % top-1 with 8, 15, 26, 52 and 95 "
        "million parameters (repository).",
    ),
    code="ZacharyMeng/NaLaFormer",
)
