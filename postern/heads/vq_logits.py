"""VQ-Logits: an output layer with a few code vectors, shared among classes by a fixed table.

With a codebook ``C`` [codes, features] and a table ``M`` from classes to codes, class ``i`` has the logit

    z_i = h . c_M(i) (+ b_i)

Paper: "VQ-Logits: Compressing the Output Bottleneck of Large Language Models via Vector Quantized Logits" (arXiv
2505.10202). There the biases ``b`` do not exist, so that the classes of a code are equally likely in every context.
Ours, and no part of the paper: the bias ``b`` with ``sum_{i in code} e^b_i = 1``, which makes the layer a class-based
softmax, ``P(i|h) = P(code|h) e^b_i``; the loss, the samples and the best classes that are found without a logit a
class. The identity behind them, with ``m_k = log sum_{i in code k} e^b_i`` (``log n_k`` for a code of n_k classes
without biases, 0 with them), is

    log sum_i e^z_i = log sum_k e^(h . c_k + m_k)

so that ``-log P(y|h)`` is the cross-entropy of the codes, with ``m`` as a prior, plus ``m_M(y) - b_y``, a constant.
"""

from __future__ import annotations

from typing import Literal, Self

import torch
from jaxtyping import Float, Int, Num
from torch import Tensor, nn
from torch.nn import functional as F

from postern.heads.protocol import check_hidden, check_target
from postern.heads.token_mapping import (
    check_counts,
    check_mapping,
    frequency_kmeans_mapping,
    frequency_mapping,
    kmeans,
    random_mapping,
    unigram_bias,
)

MappingMethod = Literal["kmeans", "frequency+kmeans", "frequency", "random"]
TokenBias = Literal["unigram"]

# Shares of a code are kept in fixed point: integers survive a conversion of the module to 16 bits.
_ONE = 1 << 30
_ROWS_AT_ONCE = 32


def scatter_logits(
    code_logits: Float[Tensor, "*batch codes"],
    mapping: Int[Tensor, " classes"],
    token_bias: Float[Tensor, " classes"] | None = None,
) -> Float[Tensor, "*batch classes"]:
    """Give every class the logit of its code, plus its bias: ``z_i = L_M(i) + b_i``."""
    if code_logits.device.type == "cpu" and code_logits.dtype.itemsize == 2:
        # on a CPU torch selects 32-bit numbers as vectors, but 16-bit numbers one by one
        parts = torch.split(code_logits.reshape(-1, code_logits.shape[-1]), _ROWS_AT_ONCE)
        selected = torch.cat([part.float().index_select(-1, mapping).to(part.dtype) for part in parts])
        logits = selected.reshape(*code_logits.shape[:-1], len(mapping))
    else:
        logits = code_logits.index_select(-1, mapping)
    return logits if token_bias is None else logits.add_(token_bias.to(logits.dtype))


def vq_cross_entropy(
    code_logits: Float[Tensor, "*batch codes"],
    target: Int[Tensor, "*batch"],
    mapping: Int[Tensor, " classes"],
    code_sizes: Int[Tensor, " codes"],
    token_bias: Float[Tensor, " classes"] | None = None,
    ignore_index: int = -100,
) -> Float[Tensor, ""]:
    """Return the mean cross-entropy of the scattered logits, without scattering them: one logit a code.

    Args:
        code_logits: ``L``.
        target: the true classes.
        mapping: the code of each class.
        code_sizes: number of classes of each code.
        token_bias: of each class, ``e^b`` summing to 1 in each code; none in the paper.
        ignore_index: targets that count for nothing.

    Raises:
        IndexError: a target that is no class (on a GPU, an assertion of the device).
    """
    num_codes = code_logits.shape[-1]
    flat = target.reshape(-1).long()
    is_valid = flat != ignore_index
    known = torch.where(is_valid, flat, 0)
    codes = mapping.index_select(0, known).long()
    log_mass = code_log_mass(code_sizes, code_logits.dtype, is_normalised=token_bias is not None)
    within = log_mass[codes] if token_bias is None else -token_bias.to(log_mass.dtype)[known]
    across = F.cross_entropy(code_logits.reshape(-1, num_codes) + log_mass, torch.where(is_valid, codes, -100))
    return across + torch.where(is_valid, within, 0).sum() / is_valid.sum()


def code_log_mass(
    code_sizes: Int[Tensor, " codes"], dtype: torch.dtype, *, is_normalised: bool
) -> Float[Tensor, " codes"]:
    """Return ``m_k``: ``log n_k``, or 0 where biases sum to one in each code; -inf for an empty code.

    In at least float32, so that sums of code logits and this are, too.
    """
    sizes = code_sizes.to(torch.promote_types(dtype, torch.float32))
    return (sizes.clamp_max(1) if is_normalised else sizes).log()


class VQLogitsHead(nn.Module):
    """A codebook in place of an output matrix; see the module's docstring for the equations.

    ``loss``, ``log_prob``, ``sample`` and ``topk`` take one logit a code; only ``logits`` has one a class. The layer
    keeps ``codes * features`` parameters (and a bias a code), and tables of integers: a code for each class, and the
    classes of each code. In fewest bits the former is what a checkpoint needs, see `postern.heads.head_cost`.

    Whatever is trained, the negative log-likelihood of a text is at least the mean of ``log n_M(y)``: see
    `postern.heads.tying_floor`. Measure what a mapping costs before training, by `postern.heads.projection_bound`.

    Args:
        in_features: width of the hidden vectors.
        num_classes: size of the vocabulary, at least 2.
        num_codes: number of code vectors.
        mapping: the code of each class; random and balanced by default.
        token_bias: ``b``, one number a class, or None as in the paper. It is shifted so that ``e^b`` sums to one in
            each code, and not trained: see `postern.heads.unigram_bias`.
        bias: whether codes have biases, which are trained.

    Attributes:
        codebook: linear layer with the code vectors.
        mapping: int32, the code of each class.
        token_bias: the biases, or None.

    Raises:
        ValueError: impossible sizes, or a mapping or biases that do not fit.
    """

    mapping: Tensor
    order: Tensor
    starts: Tensor
    token_bias: Tensor | None
    cumulative: Tensor | None

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        num_codes: int,
        mapping: Int[Tensor, " num_classes"] | None = None,
        *,
        token_bias: Float[Tensor, " num_classes"] | None = None,
        bias: bool = True,
    ) -> None:
        super().__init__()
        if in_features < 1 or num_classes < 2 or not 1 <= num_codes <= num_classes:
            raise ValueError(
                "a codebook needs in_features >= 1, num_classes >= 2 and 1 <= num_codes <= num_classes, "
                f"got {in_features}, {num_classes} and {num_codes}"
            )
        self.in_features = in_features
        self.num_classes = num_classes
        self.num_codes = num_codes
        self.codebook = nn.Linear(in_features, num_codes, bias=bias)
        if mapping is None:
            mapping = random_mapping(num_classes, num_codes)
        for name, size in (("mapping", num_classes), ("order", num_classes), ("starts", num_codes + 1)):
            self.register_buffer(name, torch.zeros(size, dtype=torch.int32))
        self.register_buffer("token_bias", None if token_bias is None else torch.zeros(num_classes))
        self.register_buffer("cumulative", None if token_bias is None else torch.zeros(num_classes, dtype=torch.int32))
        self._assign(mapping, token_bias)

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        num_codes: int,
        method: MappingMethod = "kmeans",
        *,
        counts: Num[Tensor, " num_classes"] | None = None,
        token_bias: TokenBias | None = None,
        num_shared: int | None = None,
        iterations: int = 25,
        seed: int = 0,
    ) -> Self:
        """Compress a trained output layer.

        The rows that are clustered have the dense layer's bias as a last coordinate. A code begins as the mean of its
        rows, weighted by the classes' shares of the code; with a token bias the entropy of the shares is added to the
        code's bias. That is the code's log-mass where the shares are those of the dense layer.

        Args:
            linear: what to compress; it stays as it is.
            num_codes: number of code vectors.
            method: "kmeans" clusters the rows, as the paper does; "frequency+kmeans" gives frequent classes a code
                each, and clusters the rest; "frequency" makes codes about equally frequent; "random" is balanced.
            counts: how often each class occurs in the training text; not needed for "kmeans" and "random" without
                token bias.
            token_bias: "unigram" for `postern.heads.unigram_bias`, or None as in the paper.
            num_shared: for "frequency+kmeans", see `postern.heads.frequency_kmeans_mapping`.
            iterations: of `postern.heads.kmeans`.
            seed: of the clusters or the random mapping.

        Raises:
            ValueError: counts that are missing or do not fit, an unknown method, or impossible numbers of codes.
        """
        if token_bias not in (None, "unigram"):
            raise ValueError(f"token_bias is 'unigram' or None, got {token_bias!r}")
        rows = linear_rows(linear)
        if counts is not None:
            check_counts(counts, len(rows))
            counts = counts.to(rows.device)
        elif token_bias is not None:
            raise ValueError("a unigram bias needs counts, got None")
        mapping = _mapping_of(rows, num_codes, method, counts, num_shared, iterations, seed)
        shares = None if token_bias is None or counts is None else unigram_bias(counts, mapping)
        head = cls(
            linear.in_features,
            linear.out_features,
            num_codes,
            mapping,
            token_bias=shares,
            bias=linear.bias is not None or shares is not None,
        ).to(rows.device)
        head.codebook.to(rows.dtype)  # token biases stay as they are, logarithms of shares to seven digits
        codes = code_rows(rows, mapping, num_codes, shares)
        with torch.no_grad():
            head.codebook.weight.copy_(codes[:, : linear.in_features])
            if head.codebook.bias is not None:
                start = codes[:, -1] if linear.bias is not None else torch.zeros_like(codes[:, 0])
                head.codebook.bias.copy_(start if shares is None else start + code_entropy(mapping, num_codes, shares))
        return head

    @property
    def code_sizes(self) -> Int[Tensor, " num_codes"]:
        """Number of classes of each code."""
        return self.starts.diff()

    def code_logits(self, hidden: Float[Tensor, "*batch in_features"]) -> Float[Tensor, "*batch num_codes"]:
        """Return ``L_k = h . c_k``, one logit a code.

        Raises:
            ValueError: hidden vectors of another width, or not floating point.
        """
        check_hidden(hidden, self.in_features)
        logits: Tensor = self.codebook(hidden)
        return logits

    def logits(self, hidden: Float[Tensor, "*batch in_features"]) -> Float[Tensor, "*batch num_classes"]:
        """Return ``z_i = L_M(i) + b_i``, one logit a class; their number is what this costs.

        Raises:
            ValueError: see `code_logits`.
        """
        return scatter_logits(self.code_logits(hidden), self.mapping, self.token_bias)

    def forward(self, hidden: Float[Tensor, "*batch in_features"]) -> Float[Tensor, "*batch num_classes"]:
        """Return the logits."""
        return self.logits(hidden)

    def loss(self, hidden: Float[Tensor, "*batch in_features"], target: Int[Tensor, "*batch"]) -> Float[Tensor, ""]:
        """Return the mean of ``-log P(y|h)`` from one logit a code; a target of -100 counts for nothing.

        Raises:
            ValueError: see `Head.loss`.
        """
        check_target(hidden, target)
        return vq_cross_entropy(self.code_logits(hidden), target, self.mapping, self.code_sizes, self.token_bias)

    def log_prob(
        self, hidden: Float[Tensor, "*batch in_features"], target: Int[Tensor, "*batch"]
    ) -> Float[Tensor, "*batch"]:
        """Return ``log P(y|h)`` of one class for each hidden vector, from one logit a code.

        Raises:
            ValueError: see `Head.loss`.
        """
        check_target(hidden, target)
        code_logits = self.code_logits(hidden)
        code_logits = code_logits.to(torch.promote_types(code_logits.dtype, torch.float32))
        tokens = target.reshape(-1).long()
        codes = self.mapping.index_select(0, tokens).long().reshape(target.shape)
        score = code_logits.gather(-1, codes[..., None])[..., 0]
        if self.token_bias is not None:
            score = score + self.token_bias[tokens].reshape(target.shape)
        return score - self._log_partition(code_logits)

    @torch.no_grad()
    def sample(
        self, hidden: Float[Tensor, "*batch in_features"], generator: torch.Generator | None = None
    ) -> Int[Tensor, "*batch"]:
        """Draw a class for each hidden vector: first a code, then a class of the code.

        The second step is uniform, one look-up; with a token bias it is a binary search in the code's shares, known to
        1e-9.

        Args:
            hidden: hidden vectors.
            generator: draws, on the device of ``hidden``.

        Raises:
            ValueError: see `code_logits`.
        """
        code_logits = self.code_logits(hidden)
        log_mass = code_log_mass(self.code_sizes, code_logits.dtype, is_normalised=self.token_bias is not None)
        weights = (code_logits + log_mass).softmax(-1).reshape(-1, self.num_codes)
        codes = torch.multinomial(weights, 1, generator=generator)[:, 0]
        first, last = self.starts[codes], self.starts[codes + 1] - 1
        if self.cumulative is None:
            draw = torch.rand(codes.shape, device=codes.device, generator=generator)
            place = torch.minimum(first + (draw * (last - first + 1)).int(), last)
        else:
            draw = torch.randint(_ONE, codes.shape, device=codes.device, generator=generator)
            for _ in range(self.num_classes.bit_length()):
                middle = (first + last) // 2
                is_later = self.cumulative[middle] <= draw
                first, last = torch.where(is_later, middle + 1, first), torch.where(is_later, last, middle)
            place = first
        return self.order[place].long().reshape(hidden.shape[:-1])

    @torch.no_grad()
    def topk(
        self, hidden: Float[Tensor, "*batch in_features"], k: int = 1
    ) -> tuple[Float[Tensor, "*batch k"], Int[Tensor, "*batch k"]]:
        """Return the log-probabilities of the k likeliest classes, and the classes.

        Only the k codes whose best classes score highest can hold them, and of each code only the first classes in the
        order of their biases: k (k + 1) / 2 candidates. Equally likely classes of a code come in their own order.

        Args:
            hidden: hidden vectors.
            k: how many.

        Raises:
            ValueError: k below 1 or above the number of classes, or see `code_logits`.
        """
        if not 1 <= k <= self.num_classes:
            raise ValueError(f"k is between 1 and the number of classes, {self.num_classes}, got {k}")
        code_logits = self.code_logits(hidden)
        code_logits = code_logits.to(torch.promote_types(code_logits.dtype, torch.float32))
        partition = self._log_partition(code_logits)[..., None]
        searched = min(k, self.num_codes)
        # j codes with better best classes and r better classes of its own: with j + r < k a class can be among the best
        j, column = torch.triu_indices(searched, k, device=hidden.device)
        r = column - j
        if len(r) >= self.num_classes:
            scattered = scatter_logits(code_logits, self.mapping, self.token_bias)
            values, found = scattered.sort(descending=True, stable=True)
            return values[..., :k] - partition, found[..., :k]
        sizes = self.code_sizes
        best = code_logits.masked_fill(sizes == 0, -torch.inf)
        if self.token_bias is not None:
            best = best + self.token_bias[self.order[self.starts[:-1].clamp_max(self.num_classes - 1)]]
        codes = best.topk(searched).indices[..., j]
        classes = self.order[(self.starts[codes] + r).clamp_max(self.num_classes - 1)].long()
        scores = code_logits.gather(-1, codes)
        if self.token_bias is not None:
            scores = scores + self.token_bias[classes]
        scores = scores.masked_fill(r >= sizes[codes], -torch.inf)
        values, found = scores.sort(descending=True, stable=True)
        return values[..., :k] - partition, classes.gather(-1, found[..., :k])

    @torch.no_grad()
    def remap(
        self,
        features: Float[Tensor, "num_classes features"],
        *,
        counts: Num[Tensor, " num_classes"] | None = None,
        optimizer: torch.optim.Optimizer | None = None,
        iterations: int = 10,
    ) -> float:
        """Assign the classes to codes anew, by clusters of features that start from the present ones.

        A new code is the mean of the code vectors that its classes had before, and so is its share of the optimizer's
        state.

        Args:
            features: a vector a class, e.g. the input embeddings, or the mean hidden vector before each class.
            counts: for the new token biases; needed if there are any.
            optimizer: whose moments of the codebook move along.
            iterations: of `postern.heads.kmeans`.

        Returns:
            The share of classes that have changed codes.

        Raises:
            ValueError: not one vector a class, or token biases without counts.
        """
        if features.shape[:1] != (self.num_classes,):
            raise ValueError(f"features must be [{self.num_classes}, features], got {list(features.shape)}")
        if self.token_bias is not None and counts is None:
            raise ValueError("new token biases need counts, got None")
        device, old = self.mapping.device, self.mapping.long()
        features = features.detach().to(device)
        features = features.to(torch.promote_types(features.dtype, torch.float32))
        centroids = code_rows(features, old, self.num_codes)
        new = kmeans(features, self.num_codes, iterations=iterations, centroids=centroids).assignment
        for parameter in self.codebook.parameters():
            state = {} if optimizer is None else optimizer.state.get(parameter, {})
            for tensor in (parameter, *state.values()):
                if isinstance(tensor, Tensor) and tensor.shape == parameter.shape:
                    rows = tensor.reshape(self.num_codes, -1)[old]
                    tensor.copy_(code_rows(rows, new, self.num_codes).reshape(tensor.shape))
        self._assign(new, None if counts is None or self.token_bias is None else unigram_bias(counts.to(device), new))
        return (new != old).double().mean().item()

    def extra_repr(self) -> str:
        """Sizes, for printing."""
        return f"{self.num_classes} classes, {self.num_codes} codes, token_bias={self.token_bias is not None}"

    def _log_partition(self, code_logits: Tensor) -> Tensor:
        log_mass = code_log_mass(self.code_sizes, code_logits.dtype, is_normalised=self.token_bias is not None)
        return torch.logsumexp(code_logits + log_mass, -1)

    @torch.no_grad()
    def _assign(self, mapping: Tensor, token_bias: Tensor | None) -> None:
        """Set the tables: classes sorted by code, in a code by falling bias, and the cumulative shares of each code."""
        if self.mapping.is_meta:
            return  # a skeleton, whose tables come with its state
        check_mapping(mapping, self.num_classes, self.num_codes)
        codes = mapping.long()
        sizes = torch.bincount(codes, minlength=self.num_codes)
        starts = F.pad(sizes.cumsum(0), (1, 0))
        if token_bias is None:
            order = codes.argsort(stable=True)
        else:
            if token_bias.shape != mapping.shape or not torch.isfinite(token_bias).all():
                raise ValueError(
                    f"token_bias must be finite and [{self.num_classes}], one a class, got {list(token_bias.shape)}"
                )
            biases = token_bias.to(codes.device).double()
            by_bias = biases.argsort(descending=True, stable=True)
            order = by_bias[codes[by_bias].argsort(stable=True)]
            biases = biases - _log_sum_by_code(biases, codes, self.num_codes)[codes]
            assert self.token_bias is not None
            assert self.cumulative is not None
            self.token_bias.copy_(biases)
            running = F.pad(biases.exp()[order].cumsum(0), (1, 0))
            share = (running[1:] - running[starts[codes[order]]]).clamp(0, 1)
            share[starts[1:][sizes > 0] - 1] = 1
            self.cumulative.copy_((share * _ONE).round())
        self.mapping.copy_(codes)
        self.order.copy_(order)
        self.starts.copy_(starts)


def linear_rows(linear: nn.Linear) -> Float[Tensor, "classes features"]:
    """The rows of a linear layer, with its bias, if any, as a last coordinate.

    Raises:
        ValueError: not a linear layer.
    """
    if not isinstance(linear, nn.Linear):
        raise ValueError(f"only a torch.nn.Linear can be compressed, got {type(linear).__name__}")
    weight = linear.weight.detach()
    return weight if linear.bias is None else torch.cat([weight, linear.bias.detach()[:, None]], 1)


def code_rows(
    rows: Float[Tensor, "classes features"],
    mapping: Int[Tensor, " classes"],
    num_codes: int,
    log_shares: Float[Tensor, " classes"] | None = None,
) -> Float[Tensor, "codes features"]:
    """Return the mean of each code's rows, weighted by ``e^log_shares``, which sum to one in a code; 0 if it is empty.

    Without shares all rows of a code weigh the same.
    """
    if log_shares is None:
        sizes = torch.bincount(mapping, minlength=num_codes).clamp_min(1)
        weighted = rows / sizes[mapping, None].to(rows.dtype)
    else:
        weighted = rows * log_shares.exp().to(rows.dtype)[:, None]
    return rows.new_zeros(num_codes, rows.shape[1]).index_add(0, mapping, weighted)


def code_entropy(
    mapping: Int[Tensor, " classes"], num_codes: int, log_shares: Float[Tensor, " classes"]
) -> Float[Tensor, " codes"]:
    """Return the entropy of each code's shares, in nats."""
    terms = -log_shares.exp() * log_shares
    return log_shares.new_zeros(num_codes).index_add(0, mapping, terms)


def _log_sum_by_code(values: Tensor, codes: Tensor, num_codes: int) -> Tensor:
    """``log sum_{i in code} e^value_i``."""
    highest = values.new_full((num_codes,), -torch.inf).scatter_reduce(0, codes, values, "amax")
    total = values.new_zeros(num_codes).index_add(0, codes, (values - highest[codes]).exp())
    return total.log() + highest


def _mapping_of(
    rows: Tensor,
    num_codes: int,
    method: MappingMethod,
    counts: Tensor | None,
    num_shared: int | None,
    iterations: int,
    seed: int,
) -> Tensor:
    if method == "kmeans":
        return kmeans(rows, num_codes, iterations=iterations, seed=seed).assignment
    if method == "random":
        return random_mapping(len(rows), num_codes, torch.Generator().manual_seed(seed)).to(rows.device)
    if method not in ("frequency", "frequency+kmeans"):
        raise ValueError(f"method must be kmeans, frequency+kmeans, frequency or random, got {method!r}")
    if counts is None:
        raise ValueError(f"the method {method!r} needs counts, got None")
    if method == "frequency":
        return frequency_mapping(counts, num_codes)
    return frequency_kmeans_mapping(rows, counts, num_codes, num_shared=num_shared, iterations=iterations, seed=seed)
