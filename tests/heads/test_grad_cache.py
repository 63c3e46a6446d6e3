import copy

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from postern.heads import DualEncoder, GradCache, streaming_decoupled_softmax_loss
from postern.nets import BagOfWords

QUERIES, LABELS = torch.randint(1, 30, (6, 4)), torch.randint(1, 30, (23, 4))
TARGETS = torch.tensor([0, 0, 1, 2, 3, 4, 5, 5]), torch.tensor([3, 8, 22, 0, 7, 7, 11, 20])


def encoder(dropout=0.3):
    torch.manual_seed(0)
    return DualEncoder(nn.Sequential(BagOfWords(30, 16, 16), nn.Dropout(dropout), nn.Linear(16, 5))).double()


def loss(query, label):
    return streaming_decoupled_softmax_loss(query, label, TARGETS, tau=0.1)


def gradients(model):
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def plain(model, chunk, query_chunk=None):
    """The same chunks, all graphs at once."""
    queries = torch.cat([model(part) for part in QUERIES.split(query_chunk or 6)])
    value = loss(queries, torch.cat([model(part) for part in LABELS.split(chunk)]))
    value.backward()
    return value.detach()


@pytest.mark.parametrize(("chunk", "query_chunk"), [(1, None), (7, None), (7, 2), (23, 6), (100, 100)])
def test_loss_and_gradients_are_those_of_plain_training_with_dropout(chunk, query_chunk):
    cached, reference = encoder(), encoder()
    torch.manual_seed(1)
    value = GradCache(cached, chunk, query_chunk).step(QUERIES, LABELS, loss)
    after = torch.rand(1)
    torch.manual_seed(1)
    torch.testing.assert_close(value, plain(reference, chunk, query_chunk))
    assert torch.equal(after, torch.rand(1)), "the generator goes on as if there had been one pass"
    for name, gradient in gradients(reference).items():
        torch.testing.assert_close(gradients(cached)[name], gradient, msg=lambda text, name=name: f"{name}: {text}")


def test_gradients_accumulate_and_the_rest_of_the_model_learns_too():
    model = encoder(dropout=0.0)
    scale = nn.Parameter(torch.tensor(2.0, dtype=torch.float64))
    step = GradCache(model, 7).step
    step(QUERIES, LABELS, lambda q, l: scale * loss(q, l))
    once = {name: gradient.clone() for name, gradient in gradients(model).items()}
    torch.testing.assert_close(scale.grad, loss(model(QUERIES), model(LABELS)).detach())
    step(QUERIES, LABELS, lambda q, l: scale * loss(q, l))
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, 2 * once[name])


def test_inputs_may_be_mappings_tuples_and_lists():
    class Words(nn.Module):
        def __init__(self):
            super().__init__()
            self.bag = BagOfWords(30, 8, 4)

        def forward(self, inputs=None, *, tokens=None):
            if isinstance(inputs, list):
                tokens = torch.tensor([[int(word) for word in text.split()] for text in inputs])
            elif isinstance(inputs, tuple):
                tokens = inputs[0]
            return self.bag(inputs if tokens is None else tokens)

    torch.manual_seed(0)
    model = DualEncoder(Words()).double()
    found = []
    texts = [" ".join(map(str, row)) for row in LABELS.tolist()]
    for labels in (LABELS, {"tokens": LABELS}, (LABELS,), texts):
        model.zero_grad()
        GradCache(model, 5).step(QUERIES, labels, loss)
        found.append(copy.deepcopy(gradients(model)))
    for other in found[1:]:
        for name, gradient in found[0].items():
            torch.testing.assert_close(other[name], gradient)


def test_autocast_reaches_both_passes():
    model = encoder(dropout=0.0).float()
    with torch.autocast("cpu", torch.bfloat16):
        value = GradCache(model, 7).step(QUERIES, LABELS, loss)
    assert value.isfinite()
    lower = {name: gradient.clone() for name, gradient in gradients(model).items()}
    model.zero_grad()
    GradCache(model, 7).step(QUERIES, LABELS, loss)
    for name, gradient in gradients(model).items():
        assert (lower[name] - gradient).norm() < 0.1 * gradient.norm(), name


def test_an_encoder_in_data_parallel_gets_its_gradients(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        model, reference = encoder(0.0), encoder(0.0)
        GradCache(DistributedDataParallel(model), 7).step(QUERIES, LABELS, loss)
        plain(reference, 7)
        for name, gradient in gradients(reference).items():
            torch.testing.assert_close(gradients(model)[name], gradient)
    finally:
        torch.distributed.destroy_process_group()


def test_wrong_arguments_are_refused():
    model = encoder()
    for chunks in ((0, None), (5, 0)):
        with pytest.raises(ValueError, match="at least one input, got chunk="):
            GradCache(model, *chunks)
    step = GradCache(model, 5).step
    with pytest.raises(ValueError, match="at least one query and one label, got none"):
        step(QUERIES, LABELS[:0], loss)
    with pytest.raises(ValueError, match=r"one length, got \[22, 23\]"):
        step(QUERIES, {"tokens": LABELS, "mask": LABELS[1:]}, loss)
    with pytest.raises(ValueError, match=r"must be a scalar, got \[6, 23\]"):
        step(QUERIES, LABELS, lambda q, l: q @ l.T)
