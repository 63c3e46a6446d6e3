"""Fine-tuning only the weights that robustness does not need."""

from datetime import date

from postern.claims import Paper

PAPER = Paper(
    slug="rift",
    title="Improving Generalization of Adversarial Training via Robust Critical Fine-Tuning",
    date=date(2023, 8, 1),
    arxiv="2308.02533",
    authors=5,
    family="robust",
    summary=(
        "An adversarially trained classifier pays with clean accuracy. RiFT gives some back afterwards: it "
        "measures for each weight tensor how much the robust loss can rise when that tensor alone is moved, "
        "fine-tunes only the least critical one on clean data, and interpolates to the point with the best clean "
        "accuracy whose robustness has not dropped. It suits those who own such a classifier and do not want to "
        "train it again."
    ),
    reported=(
        "ResNet18 on CIFAR-10, clean / corrupted / attacked accuracy: 81.46 / 73.56 / 53.63 % before, 83.44 / "
        "75.69 / 53.65 % after.",
        "ResNet34 on CIFAR-100: 58.67 / 48.24 / 30.50 % before, 60.88 / 49.97 / 30.58 % after.",
        "The choice of tensor matters: the most critical one gives 83.36 / 75.42 / 52.48 %, all layers 83.56 / "
        "75.48 / 52.66 % on ResNet18 and CIFAR-10.",
        "Moving the most critical tensor of ResNet18 raises the robust loss by 12.94, the least critical one by "
        "0.09 (CIFAR-10).",
    ),
    code="microsoft/robustlearn",
)
