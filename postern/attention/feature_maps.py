"""Features for linear attention, by name: common ones, those of NaLaFormer, and those without a part of its idea."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

from jaxtyping import Float
from torch import Tensor

from postern.attention.linear import FeatureMap, elu_features
from postern.attention.norm_aware import norm_aware_key_features, norm_aware_query_features


@dataclass(frozen=True)
class Features:
    """Features of queries and of keys, none of them negative.

    Attributes:
        query: of the queries, ``[..., head_dim] -> [..., features]``.
        key: of the keys.
    """

    query: FeatureMap
    key: FeatureMap


def relu_features(x: Float[Tensor, "*batch head_dim"], power: int = 1) -> Float[Tensor, "*batch head_dim"]:
    """``max(x, 0)^power``."""
    positive = x.relu()
    return positive if power == 1 else positive**power


_CUBED = partial(relu_features, power=3)

FEATURE_MAPS: Mapping[str, Features] = {
    "elu": Features(elu_features, elu_features),
    "relu": Features(relu_features, relu_features),
    "relu-cubed": Features(_CUBED, _CUBED),
    "norm-aware": Features(norm_aware_query_features, norm_aware_key_features),
    "norm-aware-soft": Features(
        partial(norm_aware_query_features, phase="soft"), partial(norm_aware_key_features, phase="soft")
    ),
    "fixed-exponent": Features(partial(norm_aware_query_features, has_norm_exponent=False), norm_aware_key_features),
    "fixed-exponent-soft": Features(
        partial(norm_aware_query_features, phase="soft", has_norm_exponent=False),
        partial(norm_aware_key_features, phase="soft"),
    ),
    "unsigned": Features(partial(norm_aware_query_features, phase=None), partial(norm_aware_key_features, phase=None)),
}
"""``elu`` and ``relu`` are those of linear transformers, ``relu-cubed`` is spiky at any norm; ``fixed-exponent`` is
norm-aware attention without the norm, ``unsigned`` that without the signs."""
