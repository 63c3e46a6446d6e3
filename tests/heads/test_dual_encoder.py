import pytest
import torch
from torch import nn

from postern.heads import DualEncoder, decoupled_softmax_loss, top_labels
from postern.nets import BagOfWords
from tests.modules import check_module

TOKENS = torch.tensor([[3, 1, 0, 0], [2, 5, 7, 0], [4, 4, 1, 6]])


class States(nn.Module):
    """An encoder that returns one state a token."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(9, 6)

    def forward(self, input_ids, attention_mask=None):
        return self.embedding(input_ids)


@pytest.mark.parametrize(
    "build",
    [
        lambda: DualEncoder(BagOfWords(9, 8, 6)),
        lambda: DualEncoder(States(), "mean", dim=3, encoder_dim=6, normalize=False, tau=1.0),
    ],
)
def test_module(build):
    check_module(build, TOKENS)


def test_pooling_and_normalisation():
    states = States()
    mask = (TOKENS > 0).long()
    embedded = states.embedding(TOKENS)
    first = DualEncoder(states, normalize=False)
    torch.testing.assert_close(first(TOKENS), embedded[:, 0])
    torch.testing.assert_close(DualEncoder(states)(TOKENS), nn.functional.normalize(embedded[:, 0], dim=1))
    mean = DualEncoder(states, "mean", normalize=False)
    torch.testing.assert_close(mean(TOKENS), embedded.mean(1))
    expected = torch.stack([row[: int(n)].mean(0) for row, n in zip(embedded, mask.sum(1), strict=True)])
    torch.testing.assert_close(mean({"input_ids": TOKENS, "attention_mask": mask}), expected)


def test_scores_are_inner_products_over_tau():
    model = DualEncoder(BagOfWords(9, 8, 6), tau=0.1).double()
    q, l = model(TOKENS), model(TOKENS[:2])
    scores = model.scores(q, l)
    torch.testing.assert_close(scores, q @ l.T * 10)
    torch.testing.assert_close(scores.diagonal(), torch.full((2,), 10.0, dtype=torch.float64))
    excluded = torch.tensor([0, 2]), torch.tensor([1, 0])
    left_out = model.scores(q, l, excluded)
    assert (left_out[excluded] == -torch.inf).all()
    assert (left_out == -torch.inf).sum() == 2
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model.scores(q, l), scores)


def test_a_model_of_hugging_face_built_from_a_configuration_learns():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.DistilBertConfig(
        vocab_size=9, dim=16, n_layers=1, n_heads=2, hidden_dim=32, dropout=0.0, attention_dropout=0.0
    )
    for pooling in ("cls", "mean"):
        model = DualEncoder.from_hugging_face(config, pooling=pooling, dim=8)
        inputs = {"input_ids": TOKENS, "attention_mask": (TOKENS > 0).long()}
        assert model(inputs).shape == (3, 8)
        # What is padded and masked must not matter.
        longer = {name: nn.functional.pad(value, (0, 2)) for name, value in inputs.items()}
        torch.testing.assert_close(model(longer), model(inputs))
        optimizer = torch.optim.Adam(model.parameters(), 1e-2)
        target, losses = (torch.arange(3), torch.arange(3)), []
        labels = {"input_ids": torch.tensor([[1, 2], [3, 4], [5, 6]]), "attention_mask": torch.ones(3, 2).long()}
        for _ in range(15):
            loss = decoupled_softmax_loss(model.scores(model(inputs), model(labels)), target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[-1] < 0.2 * losses[0]


def test_wrong_arguments_are_refused():
    encoder = BagOfWords(9)
    for arguments, message in (
        ({"pooling": "max"}, "pooling must be cls or mean, got 'max'"),
        ({"tau": 0.0}, r"tau must be positive, got 0\.0"),
        ({"dim": 0}, "dim must be at least 1, got 0"),
        ({"dim": 4}, "needs encoder_dim"),
    ):
        with pytest.raises(ValueError, match=message):
            DualEncoder(encoder, **arguments)
    with pytest.raises(ValueError, match=r"\[batch, width\] or \[batch, time, width\], got \[3\]"):
        DualEncoder(nn.Flatten(0))(torch.zeros(3))
    with pytest.raises(ValueError, match="got tuple"):
        DualEncoder(nn.LSTM(2, 3))(torch.zeros(1, 2, 2))


@pytest.mark.parametrize("block", [1, 5, 13, 100])
@pytest.mark.parametrize("k", [1, 4, 13, 20])
def test_search_is_exact(block, k):
    generator = torch.Generator().manual_seed(0)
    q, l = torch.randn(6, 3, generator=generator), torch.randn(13, 3, generator=generator)
    values, indices = top_labels(q, l, k, block=block)
    expected = (q @ l.T).topk(min(k, 13), dim=1)
    torch.testing.assert_close(values, expected.values)
    assert torch.equal(indices, expected.indices)


@pytest.mark.parametrize("block", [2, 13])
def test_excluded_labels_are_not_found(block):
    q, l = torch.randn(6, 3), torch.randn(13, 3)
    excluded = torch.rand(6, 13) < 0.5
    excluded[0] = True
    values, indices = top_labels(q, l, 13, excluded=excluded.nonzero(as_tuple=True), block=block)
    for row in range(6):
        found = indices[row][indices[row] >= 0]
        assert set(found.tolist()) == set((~excluded[row]).nonzero()[:, 0].tolist())
        torch.testing.assert_close(values[row, : len(found)], (l[found] @ q[row]))
    assert (indices[0] == -1).all()


def test_wrong_searches_are_refused():
    with pytest.raises(ValueError, match=r"got \[2, 3\] and \[4, 5\]"):
        top_labels(torch.zeros(2, 3), torch.zeros(4, 5), 1)
    with pytest.raises(ValueError, match="k and block must be at least 1, got 0 and 65536"):
        top_labels(torch.zeros(2, 3), torch.zeros(4, 3), 0)
