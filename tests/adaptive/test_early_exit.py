import copy
from dataclasses import dataclass

import pytest
import torch
from torch import nn

from postern.adaptive import (
    EarlyExitModel,
    GateExit,
    MaxProbExit,
    PatienceExit,
    cache_exit_features,
    calibrate_thresholds,
    count_macs,
    exit_costs,
    replay_exits,
    select_exits,
)
from postern.nets import ConvNet, ResidualMLP
from tests.adaptive.networks import ThroughAll, apart, conv_model, resnet_model, vector_model
from tests.modules import check_module


def varied(*shape):
    """Samples that differ in scale, so that they do in what an untrained network makes of them."""
    generator = torch.Generator().manual_seed(1)
    scale = 3 * torch.rand(24, *[1] * len(shape), generator=generator)
    return scale * torch.randn(24, *shape, generator=generator)


MODELS = [(vector_model, varied(6)), (conv_model, varied(2, 8, 8)), (resnet_model, varied(3, 8, 8))]


def spread(logits):
    """A policy that stops a third of the samples at each of the first exits."""
    return MaxProbExit(calibrate_thresholds(logits, [0.3, 0.3] + [0.4 / (len(logits) - 2)] * (len(logits) - 2)))


def balance(model, features):
    """Shift the classifiers' biases so that not all samples are of one class."""
    for head, each in zip(model.heads, features, strict=True):
        head.bias.sub_(head(each).mean(0))


def policy_of(kind, logits):
    """A policy that stops some samples early and lets others go far."""
    if kind == "threshold":
        return spread(logits)
    if kind == "patience":
        return PatienceExit(1)
    policy = GateExit(len(logits) - 1).to(logits[0].dtype)
    for gate, each in zip(policy.gates, logits, strict=False):
        gate.linear.weight.copy_(torch.tensor([[30.0, 0, 0, 0]]))
        gate.linear.bias.fill_(-30 * each.softmax(1).amax(1).mean().item() - 1)
    return policy


@pytest.mark.parametrize(("build", "inputs"), MODELS)
def test_module(build, inputs):
    check_module(build, inputs)


@pytest.mark.parametrize(("build", "inputs"), MODELS)
def test_the_final_head_is_the_backbone(build, inputs):
    model = build()
    with torch.no_grad():
        assert torch.equal(model(inputs)[-1], model.backbone(inputs))


def test_exits_see_the_normalised_output_of_their_block():
    model = vector_model()
    inputs = MODELS[0][1]
    hidden = model.backbone.stem(inputs)
    with torch.no_grad():
        for head, block, found in zip(model.heads, model.backbone.blocks, model(inputs), strict=False):
            hidden = block(hidden)
            torch.testing.assert_close(found, head(model.backbone.norm(hidden)))


@pytest.mark.parametrize(("build", "inputs"), MODELS)
@pytest.mark.parametrize("kind", ["threshold", "patience", "gates"])
@torch.no_grad()
def test_stopping_early_changes_no_answer(build, inputs, kind):
    model = build()
    balance(model, model.features(inputs)[0])
    logits = model(inputs)
    policy = policy_of(kind, logits)
    exits = replay_exits(policy, logits)
    assert len(exits.unique()) > 1
    for batch in (inputs, inputs[:1], inputs[5:6]):
        found = model.forward_dynamic(batch, policy=policy)
        rows = slice(None) if len(batch) > 1 else slice(0, 1) if torch.equal(batch, inputs[:1]) else slice(5, 6)
        torch.testing.assert_close(found.exit_index, exits[rows])
        torch.testing.assert_close(found.logits, select_exits(logits, exits)[rows])


@pytest.mark.parametrize(("build", "inputs"), MODELS)
@torch.no_grad()
def test_what_runs_is_what_is_counted(build, inputs):
    model = build()
    logits = model(inputs)
    policy = spread(logits)
    costs = exit_costs(model, inputs[:2])
    assert (costs.diff() > 0).all()
    assert costs[-1] == count_macs(lambda: model(inputs[:1]))
    expected = costs[replay_exits(policy, logits)].sum()
    assert count_macs(lambda: model.forward_dynamic(inputs, policy=policy)) == expected
    each = count_macs(lambda: [model.forward_dynamic(sample, policy=policy) for sample in inputs.split(1)])
    assert each == expected
    more = exit_costs(model, inputs[:2], operations=100)
    assert (more - costs).tolist() == [100.0 * min(l + 1, model.num_exits) for l in range(model.num_exits + 1)]


def test_nothing_behind_the_last_exit_runs():
    model = conv_model()
    ran = []
    for name in model.backbone.layers:
        model.backbone.get_submodule(name).register_forward_hook(lambda *_, name=name: ran.append(name))
    model.forward_dynamic(MODELS[1][1], policy=MaxProbExit(0.0))
    # hooks run in the order in which they were registered: the exit's own ends the passage before this one
    assert ran == []
    model.forward_dynamic(MODELS[1][1], policy=MaxProbExit(1.1))
    assert ran == model.backbone.layers


def test_a_failure_leaves_the_backbone_usable():
    model = conv_model()
    with pytest.raises(ValueError, match="exit number 1"):
        model.forward_dynamic(MODELS[1][1], policy=MaxProbExit([2.0]))
    assert len(model.backbone(MODELS[1][1])) == 24


@torch.no_grad()
def test_copies_have_exits_of_their_own():
    model = conv_model()
    copied = copy.deepcopy(model)
    for head in copied.heads:
        head.bias.add_(1)
    inputs = MODELS[1][1]
    for found, first in zip(copied(inputs)[:-1], model(inputs)[:-1], strict=True):
        torch.testing.assert_close(found, first + 1)


def test_a_frozen_backbone_stays_in_evaluation_mode():
    model = conv_model().train()
    assert model.heads.training
    assert not any(module.training for module in model.backbone.modules())
    assert [name for name, each in model.named_parameters() if each.requires_grad] == [
        name for name, _ in model.named_parameters() if name.startswith("heads")
    ]
    backbone = ConvNet(2, 4)
    free = EarlyExitModel(backbone, ["stages.0"], 4, widths=16, is_frozen=False).train()
    assert backbone.training
    assert all(each.requires_grad for each in free.parameters())


def test_cached_features_give_the_same_logits():
    model = conv_model().train()
    inputs, labels = MODELS[1][1], torch.arange(24) % 4
    batches = [(inputs[:10], labels[:10]), ((inputs[10:20],), labels[10:20]), ({"images": inputs[20:]}, labels[20:])]
    cached = cache_exit_features(model, batches)
    assert model.training
    assert torch.equal(cached.labels, labels)
    for found, expected in zip(cached.all_logits(model), model(inputs), strict=True):
        torch.testing.assert_close(found, expected)
    some = cached.rows(torch.tensor([3, 1]))
    torch.testing.assert_close(some.features[1], cached.features[1][[3, 1]])


@dataclass
class Encoder:
    """A Transformers network with exits, samples, and what a sample costs in it, in multiply-adds by hand."""

    model: EarlyExitModel
    inputs: dict[str, torch.Tensor]
    layers: list[str]
    depths: list[int]  # layers that a sample has run when it leaves at each exit, the final head last
    stem: int
    layer: int
    head: int
    final: int

    def sample(self, index):
        return {name: each[index : index + 1] for name, each in self.inputs.items()}


def layer_macs(tokens, width, hidden):
    """Queries, keys, values and the output; scores and averages; the perceptron."""
    return tokens * (4 * width**2 + 2 * tokens * width + 2 * width * hidden)


def vit():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        hidden_size=16,
        num_hidden_layers=4,
        num_attention_heads=2,
        intermediate_size=32,
        image_size=8,
        patch_size=4,
        num_labels=5,
        initializer_range=0.5,
    )
    layers = [f"vit.layers.{layer}" for layer in range(4)]
    backbone = transformers.ViTForImageClassification(config)
    model = EarlyExitModel(backbone, layers[:-1], 5, widths=16, pool="first", norm="vit.layernorm")
    return Encoder(
        apart(model.double()),
        {"pixel_values": torch.randn(20, 3, 8, 8, dtype=torch.float64)},
        layers,
        depths=[1, 2, 3, 4],
        stem=4 * 48 * 16,  # patches, of pixels and channels
        layer=layer_macs(5, 16, 32),
        head=16 * 5,
        final=16 * 5,
    )


def bert():
    """Sentences of several lengths in one batch; one layer has no exit."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=30,
        hidden_size=16,
        num_hidden_layers=5,
        num_attention_heads=2,
        intermediate_size=32,
        num_labels=3,
        initializer_range=0.5,
    )
    layers = [f"bert.encoder.layer.{layer}" for layer in range(5)]
    backbone = transformers.BertForSequenceClassification(config)
    model = EarlyExitModel(backbone, [layers[0], layers[1], layers[3]], 3, widths=16, pool="first")
    return Encoder(
        apart(model.double()),
        {
            "input_ids": torch.randint(30, (20, 6)),
            "attention_mask": (torch.arange(6) < torch.arange(20)[:, None] % 5 + 2).long(),
        },
        layers,
        depths=[1, 2, 4, 5],
        stem=0,
        layer=layer_macs(6, 16, 32),
        head=16 * 3,
        final=16 * 16 + 16 * 3,  # the pooler and the classifier
    )


@pytest.fixture(params=[vit, bert])
def encoder(request):
    return request.param()


@torch.no_grad()
def test_the_final_head_of_an_encoder_is_the_encoder(encoder):
    logits = encoder.model(**encoder.inputs)
    torch.testing.assert_close(encoder.model.backbone(**encoder.inputs).logits, logits[-1])


@torch.no_grad()
def test_padding_counts_in_bert():
    """Without its mask a padded sentence gets other logits at every exit, so that a wrong mask would be seen."""
    encoder = bert()
    masked = encoder.model(**encoder.inputs)
    unmasked = encoder.model(input_ids=encoder.inputs["input_ids"])
    for one, other in zip(masked, unmasked, strict=True):
        assert ((one - other).abs().amax(1) > 1e-3).tolist() == [index % 5 + 2 < 6 for index in range(20)]


@pytest.mark.parametrize("kind", ["threshold", "patience", "gates"])
@torch.no_grad()
def test_encoders_answer_as_without_stopping_and_run_no_further_layer(encoder, kind):
    model, inputs = encoder.model, encoder.inputs
    balance(model, model.features(**inputs)[0])
    logits = model(**inputs)
    policy = policy_of(kind, logits)
    exits = replay_exits(policy, logits)
    assert len(exits.unique()) >= 3
    expected = select_exits(logits, exits)
    gate = 4 if kind == "gates" else 0  # a linear layer over four statistics
    costs = exit_costs(model, operations=gate, **encoder.sample(0))

    rows = dict.fromkeys(encoder.layers, 0)

    def count(name):
        def hook(module, arguments):
            rows[name] += len(arguments[0])

        return hook

    for name in encoder.layers:
        model.backbone.get_submodule(name).register_forward_pre_hook(count(name))

    def check(some, found, macs):
        torch.testing.assert_close(found.exit_index, exits[some])
        torch.testing.assert_close(found.logits, expected[some], rtol=1e-10, atol=1e-10)
        depths = torch.tensor(encoder.depths)[exits[some]]
        assert list(rows.values()) == [(depths > layer).sum().item() for layer in range(len(encoder.layers))]
        passed = (exits[some] + 1).clamp_max(model.num_exits).sum().item()  # classifiers
        finished = (exits[some] == model.num_exits).sum().item()
        by_hand = len(depths) * encoder.stem + sum(rows.values()) * encoder.layer
        assert macs == by_hand + passed * (encoder.head + gate) + finished * encoder.final
        assert macs == costs[exits[some]].sum()

    found = []
    macs = count_macs(lambda: found.append(model.forward_dynamic(**inputs, policy=policy)))
    check(slice(None), found.pop(), macs)
    for index in range(20):
        rows.update(dict.fromkeys(rows, 0))
        sample = encoder.sample(index)
        macs = count_macs(lambda sample=sample: found.append(model.forward_dynamic(**sample, policy=policy)))
        check(slice(index, index + 1), found.pop(), macs)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"exits": []}, r"got \[\]"),
        ({"exits": ["blocks.9"]}, "it has no blocks.9"),
        ({"exits": ["blocks.0", "blocks.0"]}, "different"),
        ({"exits": ["blocks.0"], "widths": (8, 8)}, r"widths=\[8, 8\]"),
        ({"exits": ["blocks.0"], "num_classes": 0}, "num_classes=0"),
        ({"exits": ["blocks.0"], "pool": "max"}, "'max'"),
        ({"exits": ["blocks.0"], "norm": "layernorm"}, "it has no layernorm"),
    ],
)
def test_bad_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        EarlyExitModel(ResidualMLP(4, 3, width=8), **({"num_classes": 3, "widths": 8} | options))


def test_exits_out_of_order():
    model = EarlyExitModel(ThroughAll(), ["first", "second"], 2, widths=4)
    with pytest.raises(ValueError, match=r"got \['second', 'first'\]"):
        model(torch.rand(2, 4))


def test_no_samples_and_no_batches():
    with pytest.raises(ValueError, match="got none"):
        cache_exit_features(conv_model(), [])


def test_the_package_knows_modules_that_return_tuples():
    class Pair(nn.Linear):
        def forward(self, x):
            return super().forward(x), "state"

    class Backbone(nn.Module):
        def __init__(self):
            super().__init__()
            self.block, self.head = Pair(4, 4), nn.Linear(4, 2)

        def forward(self, x):
            return self.head(self.block(x)[0])

    torch.manual_seed(0)
    model = EarlyExitModel(Backbone(), ["block"], 2, widths=4)
    inputs = torch.randn(8, 4)
    logits = model(inputs)
    policy = MaxProbExit(calibrate_thresholds(logits, (0.5, 0.5)))
    found = model.forward_dynamic(inputs, policy=policy)
    torch.testing.assert_close(found.logits, select_exits(logits, replay_exits(policy, logits)))
