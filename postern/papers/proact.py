"""Activations with learnt upper limits that stop the damage of flipped bits."""

from datetime import date

from postern.claims import Paper

PAPER = Paper(
    slug="proact",
    title="ProAct: Progressive Training for Hybrid Clipped Activation Function to Enhance Resilience of DNNs",
    date=date(2024, 6, 10),
    arxiv="2406.06313",
    authors=5,
    family="robust",
    summary=(
        "A flipped bit makes one weight huge, its activation huge, and the error floods the network. A ReLU that "
        "answers zero above a limit treats such values as faults. One limit a layer is cheap but weak, one a "
        "neuron is strong but costs memory that faults can hit as well. The paper keeps single limits everywhere "
        "but in the last activation layer, and learns them layer by layer by distillation from the unprotected "
        "network. It hardens a given network without retraining it."
    ),
    reported=(
        "Up to 6.4 times more resilient than other methods at high bit error rates, for AlexNet, VGG-16 and "
        "ResNet-50 on CIFAR-10 and CIFAR-100 (second-hand).",
        "Memory for the limits is 10.5 to 134 times smaller than with one limit a neuron (second-hand).",
        "ResNet-20 on CIFAR-10 at a bit error rate of 1e-6: 92.6 % clean, 40.0 % unprotected, 92.0 % with limits "
        "at the layers' maxima (repository).",
    ),
    code="hamidmousavi0/reliable-relu-toolbox",
)
