"""A mapping from classes to codes that is learned with the codebook, through a straight-through estimator.

Paper: "VQ-Logits: Compressing the Output Bottleneck of Large Language Models via Vector Quantized Logits" (arXiv
2505.10202), which names a learned mapping among its options. How it learns one is not known to us; this is a
reconstruction, after "Neural Discrete Representation Learning" (arXiv 1711.00937).
"""

from __future__ import annotations

from typing import Self

import torch
from jaxtyping import Float, Int, Num
from torch import Tensor, nn
from torch.nn import functional as F

from postern.heads.protocol import check_hidden, check_target
from postern.heads.token_mapping import check_mapping, kmeans, random_mapping, unigram_bias
from postern.heads.vq_logits import VQLogitsHead, code_entropy, code_rows, linear_rows, scatter_logits


def straight_through_cross_entropy(
    hidden: Float[Tensor, "positions features"],
    target: Int[Tensor, " positions"],
    rows: Float[Tensor, "classes features"],
    codes: Float[Tensor, "codes features"],
    mapping: Int[Tensor, " classes"],
    log_shares: Float[Tensor, " classes"],
    entropy: Float[Tensor, " codes"],
    ignore_index: int = -100,
) -> Float[Tensor, ""]:
    """Return the cross-entropy of tied logits, with the gradient that the classes' own rows would get.

    The logits are ``z_i = h . (e_i + stop(c_M(i) - e_i)) + H_M(i) + log s_i``: forward they are those of the codes,
    backward row i gets ``(p_i - [i = y]) h`` as in a dense layer. Only one logit a code is formed: the sum over the
    classes of a code reaches their rows through ``c_k = sum s_i e_i``, as ``p_k s_i = p_i``, and the target's row is
    gathered.

    Args:
        hidden: ``h``.
        target: ``y``; positions of ``ignore_index`` count for nothing.
        rows: ``e``.
        codes: ``c``, the mean of each code's rows by shares; it must be computed from the rows for their gradient.
        mapping: ``M``.
        log_shares: ``log s``; the shares sum to one in each code.
        entropy: ``H``, of the shares of each code.
        ignore_index: see `target`.
    """
    is_valid = target != ignore_index
    known = torch.where(is_valid, target, 0).long()
    code = mapping.index_select(0, known)
    own = rows.index_select(0, known)
    through = own + (codes.index_select(0, code) - own).detach()
    code_logits = F.linear(hidden, codes)
    dtype = torch.promote_types(code_logits.dtype, torch.float32)
    partition = torch.logsumexp(code_logits.to(dtype) + entropy, -1)
    score = (hidden * through).sum(-1).to(dtype) + entropy[code] + log_shares[known]
    return torch.where(is_valid, partition - score, 0).sum() / is_valid.sum()


class StraightThroughVQHead(nn.Module):
    """An output layer that quantises its rows while they are trained, so that they can find their codes.

    Each class keeps a row of its own, as in a dense layer, and each code is the mean of its rows; logits are those of
    the codes. Through the straight-through estimator a code moves as it would if it were trained itself, and each row
    away from it as its class asks for; `remap` then assigns rows to the nearest code, every so many steps. `freeze`
    returns the small layer. Training needs the memory of a dense layer, but never forms a logit a class.

    Args:
        in_features: width of the hidden vectors.
        num_classes: size of the vocabulary, at least 2.
        num_codes: number of codes.
        mapping: the code of each class at the start; random and balanced by default.
        counts: how often each class occurs in the training text, for the shares of a code's classes (our extension,
            see `postern.heads.unigram_bias`); equal shares by default, as in the paper.
        bias: whether rows, and so codes, have biases.
        commitment: weight of the mean squared distance of rows to their codes, which keeps them together.

    Attributes:
        table: linear layer with the rows.
        mapping: the code of each class.

    Raises:
        ValueError: impossible sizes, a mapping or counts that do not fit, or a negative commitment.
    """

    mapping: Tensor
    counts: Tensor | None

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        num_codes: int,
        mapping: Int[Tensor, " num_classes"] | None = None,
        *,
        counts: Num[Tensor, " num_classes"] | None = None,
        bias: bool = True,
        commitment: float = 0.25,
    ) -> None:
        super().__init__()
        if in_features < 1 or num_classes < 2 or not 1 <= num_codes <= num_classes:
            raise ValueError(
                "a codebook needs in_features >= 1, num_classes >= 2 and 1 <= num_codes <= num_classes, "
                f"got {in_features}, {num_classes} and {num_codes}"
            )
        if not commitment >= 0:
            raise ValueError(f"commitment must not be negative, got {commitment}")
        mapping = random_mapping(num_classes, num_codes) if mapping is None else mapping
        check_mapping(mapping, num_classes, num_codes)
        self.in_features = in_features
        self.num_classes = num_classes
        self.num_codes = num_codes
        self.commitment = commitment
        self.table = nn.Linear(in_features, num_classes, bias=bias)
        self.register_buffer("mapping", mapping.detach().clone().long())
        self.register_buffer("counts", None if counts is None else counts.detach().clone().float())
        if counts is not None:
            unigram_bias(counts, mapping)  # checks them

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        num_codes: int,
        *,
        counts: Num[Tensor, " num_classes"] | None = None,
        commitment: float = 0.25,
        iterations: int = 25,
        seed: int = 0,
    ) -> Self:
        """Start from a trained output layer: its rows, and clusters of them.

        Args:
            linear: it stays as it is.
            num_codes: number of codes.
            counts: see the class.
            commitment: see the class.
            iterations: of `postern.heads.kmeans`.
            seed: of `postern.heads.kmeans`.

        Raises:
            ValueError: not a linear layer, or see the class.
        """
        rows = linear_rows(linear)
        mapping = kmeans(rows, num_codes, iterations=iterations, seed=seed).assignment
        head = cls(
            linear.in_features,
            linear.out_features,
            num_codes,
            mapping,
            counts=None if counts is None else counts.to(rows.device),
            bias=linear.bias is not None,
            commitment=commitment,
        ).to(rows)
        head.table.load_state_dict(linear.state_dict())
        return head

    def codes(self) -> Float[Tensor, "num_codes features"]:
        """Return the means of each code's rows by shares, with the mean bias, if any, as a last coordinate."""
        weight, bias = self.table.weight, self.table.bias
        rows = weight if bias is None else torch.cat([weight, bias[:, None]], 1)
        return code_rows(rows, self.mapping, self.num_codes, self._log_shares())

    def logits(self, hidden: Float[Tensor, "*batch in_features"]) -> Float[Tensor, "*batch num_classes"]:
        """Return the logits of the codes, scattered to the classes.

        Raises:
            ValueError: hidden vectors of another width, or not floating point.
        """
        check_hidden(hidden, self.in_features)
        log_shares = self._log_shares()
        codes = self.codes()
        code_logits = F.linear(hidden, codes[:, : self.in_features])
        if self.table.bias is not None:
            code_logits = code_logits + codes[:, -1].to(code_logits.dtype)
        within = log_shares + code_entropy(self.mapping, self.num_codes, log_shares)[self.mapping]
        return scatter_logits(code_logits, self.mapping, within)

    def forward(self, hidden: Float[Tensor, "*batch in_features"]) -> Float[Tensor, "*batch num_classes"]:
        """Return the logits."""
        return self.logits(hidden)

    def loss(self, hidden: Float[Tensor, "*batch in_features"], target: Int[Tensor, "*batch"]) -> Float[Tensor, ""]:
        """Return the mean cross-entropy plus the commitment, with straight-through gradients.

        A target of -100 counts for nothing.

        Raises:
            ValueError: see `Head.loss`.
        """
        check_hidden(hidden, self.in_features)
        check_target(hidden, target)
        flat = hidden.reshape(-1, self.in_features)
        rows = self.table.weight
        if self.table.bias is not None:
            rows = torch.cat([rows, self.table.bias[:, None]], 1)
            flat = F.pad(flat, (0, 1), value=1.0)
        log_shares = self._log_shares()
        codes = code_rows(rows, self.mapping, self.num_codes, log_shares)
        entropy = code_entropy(self.mapping, self.num_codes, log_shares)
        loss = straight_through_cross_entropy(flat, target.reshape(-1), rows, codes, self.mapping, log_shares, entropy)
        apart = (rows - codes.detach()[self.mapping]).square().sum(1).mean()
        return loss + self.commitment * apart

    @torch.no_grad()
    def remap(self, iterations: int = 1) -> float:
        """Assign every row to the nearest code, and make codes the means of their rows again.

        Args:
            iterations: how often, at most. A code that loses all its rows takes the row that fits its own worst.

        Returns:
            The share of classes that have changed codes.

        Raises:
            ValueError: no iterations.
        """
        rows = linear_rows(self.table)
        new = kmeans(rows, self.num_codes, iterations=iterations, centroids=self.codes()).assignment
        moved = (new != self.mapping).double().mean().item()
        self.mapping.copy_(new)
        return moved

    @torch.no_grad()
    def freeze(self) -> VQLogitsHead:
        """Return the small layer with the same logits up to a shift: codes, mapping and, with counts, token biases."""
        shares = None if self.counts is None else self._log_shares()
        head = VQLogitsHead(
            self.in_features,
            self.num_classes,
            self.num_codes,
            self.mapping,
            token_bias=shares,
            bias=self.table.bias is not None or shares is not None,
        ).to(self.table.weight.device)
        head.codebook.to(self.table.weight.dtype)
        codes = self.codes()
        head.codebook.weight.copy_(codes[:, : self.in_features])
        if head.codebook.bias is not None:
            bias = torch.zeros_like(codes[:, 0]) if self.table.bias is None else codes[:, -1]
            head.codebook.bias.copy_(
                bias if shares is None else bias + code_entropy(self.mapping, self.num_codes, shares)
            )
        return head

    def extra_repr(self) -> str:
        """Sizes, for printing."""
        return f"{self.num_classes} classes, {self.num_codes} codes, commitment={self.commitment}"

    def _log_shares(self) -> Tensor:
        sizes = torch.zeros(self.num_codes, device=self.mapping.device)
        weights = torch.ones_like(self.mapping, dtype=sizes.dtype) if self.counts is None else self.counts.float() + 1
        return (weights / sizes.index_add(0, self.mapping, weights)[self.mapping]).log()
