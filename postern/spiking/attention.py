"""Attention of spikes, without softmax and linear in the number of positions.

``SpikingSelfAttention``: ``O = s Q (K^T V)``, all of them spikes. ``QKTokenAttention`` (QKFormer, arXiv 2403.16552):
a position passes its key on, head by head, if enough of its query spikes.

Paper: "Spiking Neural Networks Need High-Frequency Information", arXiv 2505.18608; attention of this kind is from
Spikformer (arXiv 2209.15425).
"""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor, nn

from postern.spiking.neurons import LIF
from postern.spiking.time_steps import ConvNorm

# The neuron after a product of spikes needs less to spike.
ATTENTION_THRESHOLD = 0.5


def spiking_attention(
    query: Float[Tensor, "*batch tokens dim"],
    key: Float[Tensor, "*batch tokens dim"],
    value: Float[Tensor, "*batch tokens dim"],
    scale: float = 0.125,
) -> Float[Tensor, "*batch tokens dim"]:
    """``scale * query (key^T value)``, in time ``tokens * dim^2``.

    Args:
        query: spikes.
        key: spikes.
        value: spikes.
        scale: of the output.
    """
    return query @ (key.transpose(-1, -2) @ value) * scale


class SpikingProduct(nn.Module):
    """`spiking_attention` as a module, where hooks can see what goes in.

    Args:
        scale: of the output.
    """

    def __init__(self, scale: float = 0.125) -> None:
        super().__init__()
        self.scale = scale

    def forward(
        self,
        query: Float[Tensor, "*batch tokens dim"],
        key: Float[Tensor, "*batch tokens dim"],
        value: Float[Tensor, "*batch tokens dim"],
    ) -> Float[Tensor, "*batch tokens dim"]:
        """Return the product."""
        return spiking_attention(query, key, value, self.scale)


class SpikingSelfAttention(nn.Module):
    """``x + BN(W LIF(s Q (K^T V)))`` with ``Q, K, V = LIF(BN(W LIF(x)))``.

    Args:
        dim: channels.
        num_heads: heads, which divide them.
        scale: of the product.

    Raises:
        ValueError: heads that do not divide the channels.
    """

    def __init__(self, dim: int, num_heads: int = 8, scale: float = 0.125) -> None:
        super().__init__()
        _check_heads(dim, num_heads)
        self.num_heads = num_heads
        self.neuron = LIF()
        self.query = nn.Sequential(ConvNorm(dim, dim, 1), LIF())
        self.key = nn.Sequential(ConvNorm(dim, dim, 1), LIF())
        self.value = nn.Sequential(ConvNorm(dim, dim, 1), LIF())
        self.product = SpikingProduct(scale)
        self.product_neuron = LIF(threshold=ATTENTION_THRESHOLD)
        self.projection = ConvNorm(dim, dim, 1, bias=True)

    def forward(self, x: Float[Tensor, "time batch dim height width"]) -> Float[Tensor, "time batch dim height width"]:
        """Return the mixed membrane signal."""
        spikes = self.neuron(x)
        query, key, value = (self._tokens(layer(spikes)) for layer in (self.query, self.key, self.value))
        product = self.product(query, key, value).transpose(-1, -2).reshape(x.shape)
        mixed: Tensor = x + self.projection(self.product_neuron(product))
        return mixed

    def _tokens(self, x: Tensor) -> Tensor:
        """[time, batch, heads, tokens, head_dim]."""
        heads = self.num_heads
        return x.reshape(*x.shape[:2], heads, x.shape[2] // heads, -1).transpose(-1, -2)


class QKTokenAttention(nn.Module):
    """``x + BN(W (a * k))`` with ``a = LIF(sum over a head's channels of q)`` and ``q, k = LIF(BN(W LIF(x)))``.

    Args:
        dim: channels.
        num_heads: heads, which divide them; each has its own mask.

    Raises:
        ValueError: heads that do not divide the channels.
    """

    def __init__(self, dim: int, num_heads: int = 8) -> None:
        super().__init__()
        _check_heads(dim, num_heads)
        self.num_heads = num_heads
        self.neuron = LIF()
        self.query = nn.Sequential(ConvNorm(dim, dim, 1), LIF())
        self.key = nn.Sequential(ConvNorm(dim, dim, 1), LIF())
        self.mask_neuron = LIF(threshold=ATTENTION_THRESHOLD)
        self.projection = ConvNorm(dim, dim, 1, bias=True)

    def forward(self, x: Float[Tensor, "time batch dim height width"]) -> Float[Tensor, "time batch dim height width"]:
        """Return the mixed membrane signal."""
        spikes = self.neuron(x)
        query, key = (layer(spikes).unflatten(2, (self.num_heads, -1)) for layer in (self.query, self.key))
        mask = self.mask_neuron(query.sum(3, keepdim=True))
        mixed: Tensor = x + self.projection((mask * key).flatten(2, 3))
        return mixed


def _check_heads(dim: int, num_heads: int) -> None:
    if min(dim, num_heads) < 1 or dim % num_heads:
        raise ValueError(f"heads divide the channels, got dim={dim} and num_heads={num_heads}")
