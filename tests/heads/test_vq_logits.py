import copy
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from torch import nn
from torch.nn import functional as F

from postern.heads import Head, SoftmaxHead, VQLogitsHead, kmeans, scatter_logits, unigram_bias
from tests.modules import check_module

MAPPING = torch.tensor([2, 0, 0, 1, 2, 2, 0, 1, 2])
COUNTS = torch.tensor([5, 1, 30, 2, 2, 9, 0, 11, 1])


def literal() -> VQLogitsHead:
    return VQLogitsHead(6, 9, 3, MAPPING)


def repaired() -> VQLogitsHead:
    return VQLogitsHead(6, 9, 3, MAPPING, token_bias=unigram_bias(COUNTS, MAPPING))


BOTH = pytest.mark.parametrize("build", [literal, repaired])


@BOTH
def test_module(build):
    hidden, target = torch.randn(2, 3, 6), torch.randint(9, (2, 3))
    check_module(build, hidden)
    check_module(build, hidden, target, call=lambda head, *inputs: head.loss(*inputs))
    check_module(build, hidden, target, call=lambda head, *inputs: head.log_prob(*inputs))
    check_module(build, hidden, call=lambda head, hidden: head.topk(hidden, 2), tolerance=math.inf)
    assert isinstance(build(), Head)


def test_a_random_mapping_is_saved_and_loaded():
    check_module(lambda: VQLogitsHead(4, 20, 5), torch.randn(3, 4))
    with torch.device("meta"):
        skeleton = VQLogitsHead(4, 20, 5)
    head, hidden = VQLogitsHead(4, 20, 5), torch.randn(3, 4)
    skeleton.load_state_dict(head.state_dict(), assign=True)
    assert torch.equal(skeleton(hidden), head(hidden))


# -- the identities ---------------------------------------------------------------------------------------------------


@given(st.integers(1, 12), st.integers(0, 1000), st.booleans())
def test_loss_of_codes_is_cross_entropy_of_scattered_logits(num_codes, seed, has_bias):
    torch.manual_seed(seed)
    mapping = torch.randint(num_codes, (12,))  # with empty codes, mostly
    bias = 3 * torch.randn(12) if has_bias else None
    head = VQLogitsHead(5, 12, num_codes, mapping, token_bias=bias).double()
    hidden, target = torch.randn(7, 5, dtype=torch.float64, requires_grad=True), torch.randint(12, (7,))
    small, full = head.loss(hidden, target), F.cross_entropy(head.logits(hidden), target)
    tolerance = 1e-6 if has_bias else 1e-10  # biases are kept in single precision
    torch.testing.assert_close(small, full, rtol=0, atol=tolerance)
    leaves = [hidden, *head.parameters()]
    for ours, theirs in zip(torch.autograd.grad(small, leaves), torch.autograd.grad(full, leaves), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=tolerance)
    log_probs = F.log_softmax(head.logits(hidden), -1)
    torch.testing.assert_close(
        head.log_prob(hidden, target), log_probs.gather(1, target[:, None])[:, 0], rtol=0, atol=tolerance
    )


@BOTH
def test_loss_has_the_numerical_gradient(build):
    head = build().double()
    target = torch.randint(9, (4,))
    assert torch.autograd.gradcheck(
        lambda hidden: head.loss(hidden, target), torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    )


@BOTH
def test_ignored_targets_count_for_nothing(build):
    head, hidden, target = build(), torch.randn(5, 6), torch.tensor([3, -100, 8, -100, 0])
    torch.testing.assert_close(head.loss(hidden, target), head.loss(hidden[[0, 2, 4]], target[[0, 2, 4]]))
    torch.testing.assert_close(head.loss(hidden, target), F.cross_entropy(head(hidden), target))


def test_classes_of_a_code_are_equally_likely_in_the_papers_layer():
    probabilities = literal()(torch.randn(5, 6)).softmax(-1)
    for code in range(3):
        members = probabilities[:, code == MAPPING]
        assert torch.equal(members, members[:, :1].expand_as(members))


def test_with_biases_a_code_shares_its_mass_as_the_unigrams_do():
    head = repaired()
    hidden = torch.randn(5, 6)
    probabilities = head(hidden).softmax(-1)
    across = head.code_logits(hidden).softmax(-1)
    smoothed = COUNTS + 1
    for code in range(3):
        members = code == MAPPING
        share = smoothed[members] / smoothed[members].sum()
        torch.testing.assert_close(probabilities[:, members], across[:, code : code + 1] * share)


def test_biases_are_shifted_to_sum_to_one_in_each_code():
    shift = torch.tensor([7.0, -3.0, 40.0])[MAPPING]
    bias = unigram_bias(COUNTS, MAPPING)
    torch.testing.assert_close(VQLogitsHead(6, 9, 3, MAPPING, token_bias=bias + shift).token_bias, bias)


def test_as_many_codes_as_classes_are_a_dense_layer():
    dense = SoftmaxHead(6, 9)
    head = VQLogitsHead.from_linear(dense.linear, 9)
    hidden, target = torch.randn(4, 6), torch.randint(9, (4,))
    torch.testing.assert_close(head(hidden), dense(hidden))
    torch.testing.assert_close(head.loss(hidden, target), dense.loss(hidden, target))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(3,), (0, 3), (70, 3), (2, 40, 3)])
def test_scattering_copies_exactly_in_every_type(dtype, shape):
    code_logits, bias = torch.randn(shape).to(dtype).requires_grad_(), torch.randn(9)
    expected = code_logits[..., MAPPING]
    assert torch.equal(scatter_logits(code_logits, MAPPING), expected)
    assert torch.equal(scatter_logits(code_logits, MAPPING, bias), expected + bias.to(dtype))
    weights = torch.randint(3, expected.shape).to(dtype)  # whose sums are exact
    (ours,) = torch.autograd.grad(scatter_logits(code_logits, MAPPING), code_logits, weights)
    assert torch.equal(ours, torch.autograd.grad(expected, code_logits, weights)[0])


def test_the_loss_never_holds_a_logit_a_class():
    classes, sizes = 50_000, []
    head = VQLogitsHead(4, classes, 10)
    hidden = torch.randn(64, 4, requires_grad=True)

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            sizes.extend(
                t.numel() for t in (result if isinstance(result, tuple | list) else [result]) if hasattr(t, "numel")
            )
            return result

    with Watch():
        head.loss(hidden, torch.randint(classes, (64,))).backward()
        head.sample(hidden)
        head.topk(hidden, 5)
    assert max(sizes) <= 64 * 5 * 5


# -- samples and best classes -----------------------------------------------------------------------------------------


@BOTH
def test_samples_follow_the_distribution(build):
    head, generator = build(), torch.Generator().manual_seed(0)
    hidden = torch.randn(1, 6)
    drawn = head.sample(hidden.expand(200, 100, 6), generator)
    assert drawn.shape == (200, 100)
    expected = head(hidden).softmax(-1)[0].detach().double() * drawn.numel()
    found = torch.bincount(drawn.flatten(), minlength=9)
    keep = expected > 5
    expected = torch.cat([expected[keep], expected[~keep].sum()[None]])
    found = torch.cat([found[keep], found[~keep].sum()[None]])
    assert ((found - expected).abs() <= 5 * expected.sqrt() + 5).all()
    assert stats.chisquare(found[expected > 0], expected[expected > 0], sum_check=False).pvalue > 1e-4


def test_a_class_without_mass_is_not_drawn_and_sixteen_bits_keep_the_shares():
    mapping = torch.zeros(300, dtype=torch.long)
    bias = torch.full((300,), -60.0)
    bias[[17, 200]] = torch.tensor([math.log(0.75), math.log(0.25)])
    head = VQLogitsHead(2, 300, 1, mapping, token_bias=bias).to(torch.bfloat16)
    drawn = head.sample(torch.zeros(4000, 2, dtype=torch.bfloat16), torch.Generator().manual_seed(0))
    assert set(drawn.tolist()) == {17, 200}
    assert (drawn == 17).double().mean().item() == pytest.approx(0.75, abs=0.03)


@given(st.integers(1, 12), st.integers(1, 30), st.integers(0, 1000), st.booleans())
def test_topk_is_that_of_the_scattered_logits(num_codes, k, seed, has_bias):
    torch.manual_seed(seed)
    mapping = torch.randint(num_codes, (30,))
    head = VQLogitsHead(3, 30, num_codes, mapping, token_bias=torch.randn(30) if has_bias else None).double()
    hidden = torch.randn(2, 4, 3, dtype=torch.float64)
    log_probs = F.log_softmax(head(hidden), -1)
    values, classes = head.topk(hidden, k)
    torch.testing.assert_close(values, log_probs.topk(k).values)
    torch.testing.assert_close(log_probs.gather(-1, classes), values)
    assert all(len(set(row)) == k for row in classes.flatten(0, 1).tolist())


def test_ties_go_to_the_lowest_class():
    head = VQLogitsHead(2, 40, 4, torch.arange(40) % 4)
    _, classes = head.topk(torch.randn(5, 2), 3)
    assert torch.equal(classes, classes[:, :1] + torch.tensor([0, 4, 8]))
    assert (classes[:, 0] < 4).all()


# -- compressing a layer ----------------------------------------------------------------------------------------------


def test_kmeans_sees_the_bias_and_codes_are_means_of_rows():
    linear = nn.Linear(3, 8)
    with torch.no_grad():
        linear.weight.copy_(torch.ones(8, 3) + 1e-3 * torch.randn(8, 3))
        linear.bias.copy_(torch.tensor([0.0, 5, 0, 5, 0, 5, 0, 5]))
    head = VQLogitsHead.from_linear(linear, 2)
    assert head.mapping[0] != head.mapping[1]
    assert torch.equal(head.mapping[::2], head.mapping[:1].expand(4))
    for code in range(2):
        members = head.mapping == code
        torch.testing.assert_close(head.codebook.weight[code], linear.weight[members].mean(0))
        torch.testing.assert_close(head.codebook.bias[code], linear.bias[members].mean())


def test_unigram_layer_begins_with_the_masses_of_a_layer_without_context():
    """Where the dense layer ignores the hidden vector and its bias is the unigram's logarithm, nothing is lost."""
    linear = nn.Linear(6, 9)
    probabilities = (COUNTS + 1.0) / (COUNTS + 1).sum()
    with torch.no_grad():
        linear.weight.zero_()
        linear.bias.copy_(probabilities.log())
    for method in ("kmeans", "random", "frequency", "frequency+kmeans"):
        head = VQLogitsHead.from_linear(linear, 3, method, counts=COUNTS, token_bias="unigram")
        torch.testing.assert_close(head(torch.randn(2, 6)).softmax(-1), probabilities.expand(2, 9))


def test_a_layer_without_bias_gives_the_papers_layer():
    linear = nn.Linear(6, 9, bias=False).double()
    head = VQLogitsHead.from_linear(linear, 4)
    assert head.codebook.bias is None
    assert head.codebook.weight.dtype == torch.float64
    assert torch.equal(head.mapping.long(), kmeans(linear.weight.detach(), 4).assignment)
    assert VQLogitsHead.from_linear(linear, 4, counts=COUNTS, token_bias="unigram").codebook.bias is not None


def test_a_layer_in_sixteen_bits_keeps_its_shares_in_thirty_two():
    linear = nn.Linear(6, 9).to(torch.bfloat16)
    head = VQLogitsHead.from_linear(linear, 4, counts=COUNTS, token_bias="unigram")
    assert head.codebook.weight.dtype == head(torch.randn(2, 6).to(torch.bfloat16)).dtype == torch.bfloat16
    torch.testing.assert_close(head.token_bias, unigram_bias(COUNTS, head.mapping))


def test_more_codes_come_nearer_to_the_dense_layer():
    linear, hidden = nn.Linear(8, 200), torch.randn(50, 8)
    errors = [
        (VQLogitsHead.from_linear(linear, codes)(hidden) - linear(hidden)).square().mean().item()
        for codes in (5, 20, 80, 200)
    ]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-10


# -- remapping --------------------------------------------------------------------------------------------------------


def test_remap_moves_codes_and_moments_to_the_new_clusters():
    head = VQLogitsHead(2, 6, 2, torch.tensor([0, 0, 1, 1, 0, 1]))
    optimizer = torch.optim.Adam(head.parameters())
    head.loss(torch.randn(8, 2), torch.randint(6, (8,))).backward()
    optimizer.step()
    before = copy.deepcopy(head)
    moments = optimizer.state[head.codebook.weight]["exp_avg"].clone()
    features = torch.tensor([[0.0], [0.1], [5.0], [5.1], [4.9], [0.05]])
    moved = head.remap(features, optimizer=optimizer)
    # classes 4 and 5 change places: each code keeps two of its three classes, and takes one of the other's
    assert moved == pytest.approx(2 / 6)
    assert head.mapping.tolist() == [0, 0, 1, 1, 1, 0]
    mixed = torch.tensor([[2 / 3, 1 / 3], [1 / 3, 2 / 3]])
    torch.testing.assert_close(head.codebook.weight, nn.Parameter(mixed @ before.codebook.weight))
    torch.testing.assert_close(head.codebook.bias, nn.Parameter(mixed @ before.codebook.bias))
    torch.testing.assert_close(optimizer.state[head.codebook.weight]["exp_avg"], mixed @ moments)
    torch.testing.assert_close(head(torch.ones(1, 2)), scatter_logits(head.code_logits(torch.ones(1, 2)), head.mapping))
    assert head.topk(torch.ones(1, 2), 6)[1].sort().values.tolist() == [list(range(6))]


def test_remap_of_what_is_clustered_already_changes_nothing():
    features = torch.randn(9, 4)
    mapping = kmeans(features, 3).assignment
    head = VQLogitsHead(6, 9, 3, mapping, token_bias=unigram_bias(COUNTS, mapping))
    hidden = torch.randn(4, 6)
    before = head(hidden)
    assert head.remap(features, counts=COUNTS) == 0
    torch.testing.assert_close(head(hidden), before)


# -- misuse -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: VQLogitsHead(6, 9, 10), "9 and 10"),
        (lambda: VQLogitsHead(6, 9, 3, torch.zeros(8, dtype=torch.long)), r"\[9\], got torch.int64 \[8\]"),
        (lambda: VQLogitsHead(6, 9, 3, torch.zeros(9)), "float32"),
        (lambda: VQLogitsHead(6, 9, 3, torch.full((9,), 3)), r"0\.\.2, got 3\.\.3"),
        (lambda: VQLogitsHead(6, 9, 3, MAPPING, token_bias=torch.zeros(3)), r"\[9\], one a class, got \[3\]"),
        (lambda: literal()(torch.zeros(2, 5)), r"6 features, got the shape \(2, 5\)"),
        (lambda: literal().loss(torch.zeros(2, 6), torch.zeros(3, dtype=torch.long)), r"\(2,\), got \(3,\)"),
        (lambda: literal().loss(torch.zeros(2, 6), torch.zeros(2)), "float32"),
        (lambda: literal().topk(torch.zeros(2, 6), 0), "got 0"),
        (lambda: literal().topk(torch.zeros(2, 6), 10), "9, got 10"),
        (lambda: literal().remap(torch.zeros(8, 2)), r"\[9, features\], got \[8, 2\]"),
        (lambda: repaired().remap(torch.zeros(9, 2)), "counts, got None"),
        (lambda: VQLogitsHead.from_linear(nn.Linear(6, 9), 3, "frequency"), "counts, got None"),
        (lambda: VQLogitsHead.from_linear(nn.Linear(6, 9), 3, token_bias="unigram"), "counts, got None"),
        (lambda: VQLogitsHead.from_linear(nn.Linear(6, 9), 3, token_bias="bigram"), "bigram"),
        (lambda: VQLogitsHead.from_linear(nn.Linear(6, 9), 3, "median"), "median"),
        (lambda: VQLogitsHead.from_linear(nn.Linear(6, 9), 3, counts=torch.ones(8)), r"\[9\], one a class, got \[8\]"),
        (lambda: VQLogitsHead.from_linear(nn.ReLU(), 3), "ReLU"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("target", [9, -1])
@BOTH
def test_a_class_that_is_not_there_is_refused(build, target):
    with pytest.raises(IndexError):
        build().loss(torch.zeros(1, 6), torch.tensor([target]))
    with pytest.raises(IndexError):
        build().log_prob(torch.zeros(1, 6), torch.tensor([target]))
