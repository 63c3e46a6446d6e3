"""The Z-loss: a ranking loss of the spherical family, and an output layer that costs the same for any number of classes."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import date

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from postern.claims import AllOf, AtMost, Difference, Metrics, Paper, Ratio, Run
from postern.data import TextName, load
from postern.heads import (
    FactoredLinear,
    SoftmaxHead,
    SphericalLoss,
    SquaredErrorLoss,
    TaylorSoftmaxHead,
    TaylorSoftmaxLoss,
    ZLoss,
    ZLossHead,
)
from postern.papers._output_layers import (
    AdaptiveSoftmax,
    FullSoftmax,
    HierarchicalSoftmax,
    OutputLayer,
    SampledSoftmax,
    factored,
    zipf_classes,
)
from postern.papers._timing import best_times
