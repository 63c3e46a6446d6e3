"""Patched models of Transformers against their own layers and against the graph's definition."""

import copy

import pytest
import torch

from postern.experts import patch_router, similarity_matrix

transformers = pytest.importorskip("transformers")


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def mixtral(**options):
    config = transformers.MixtralConfig(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
        sliding_window=None,
        initializer_range=0.5,
        **options,
    )
    return transformers.MixtralForCausalLM(config).eval()


def switch(**options):
    config = transformers.SwitchTransformersConfig(
        vocab_size=40,
        d_model=16,
        d_kv=4,
        d_ff=24,
        num_heads=4,
        num_layers=2,
        num_decoder_layers=2,
        num_sparse_encoder_layers=1,
        num_sparse_decoder_layers=1,
        num_experts=4,
        initializer_factor=2.0,
        **options,
    )
    return transformers.SwitchTransformersForConditionalGeneration(config).eval()


def inputs(kind, time=9):
    tokens = torch.randint(3, 40, (2, time))
    if kind == "mixtral":
        return {"input_ids": tokens, "use_cache": False}
    return {"input_ids": tokens, "decoder_input_ids": torch.randint(3, 40, (2, 7)), "use_cache": False}


MODELS = {"mixtral": mixtral, "switch": switch}


def watch(model, suffix):
    """Inputs and outputs of the routers, by name."""
    seen = {}
    for name, module in model.named_modules():
        if name.endswith(suffix):
            module.register_forward_hook(
                lambda module, args, output, name=name: seen.__setitem__(name, (args[0], output))
            )
    return seen


@pytest.mark.parametrize("kind", MODELS)
def test_without_a_graph_nothing_changes(kind):
    model = MODELS[kind]()
    patched = copy.deepcopy(model)
    graphs = patch_router(patched, "none")
    assert len(graphs) == 2
    given = inputs(kind) | {"output_router_logits": True}
    expected, found = model(**given), patched(**given)
    torch.testing.assert_close(found.logits, expected.logits)
    assert model.state_dict().keys() == patched.state_dict().keys()


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("graph", ["similarity", "attention", "uniform"])
def test_a_graph_changes_routes_and_trains(kind, graph):
    model = MODELS[kind]()
    given = inputs(kind)
    before = model(**given).logits
    graphs = patch_router(model, graph)
    after = model(**given).logits
    assert (after - before).abs().max() > 1e-3
    labels = given["input_ids"] if kind == "mixtral" else given["decoder_input_ids"]
    model.train()
    model(**given, labels=labels, output_router_logits=True).loss.backward()
    for found in graphs.values():
        for parameter in found.parameters():
            assert parameter.grad.abs().max() > 0
    assert all(f"{name}.token_graph.weight" in model.state_dict() for name in graphs) == (graph == "similarity")


def test_mixtrals_router_averages_over_similar_tokens():
    model = mixtral()
    graphs = patch_router(model, "similarity", tau=0.5)
    with torch.no_grad():
        for graph in graphs.values():
            graph.weight.normal_(std=0.3)
    seen = watch(model, "gate")
    result = model(**inputs("mixtral"), output_router_logits=True)
    for layer, (name, graph) in enumerate(graphs.items()):
        tokens, (logits, weights, indices) = seen[name]
        own = torch.nn.functional.linear(tokens, model.get_submodule(name).weight)
        matrix = similarity_matrix(tokens.view(2, 9, 16), "bilinear", 0.5, weight=graph.weight)
        expected = (matrix @ own.softmax(-1).view(2, 9, 4)).flatten(0, 1)
        best = expected.topk(2, dim=-1)
        torch.testing.assert_close(logits.softmax(-1), expected)
        torch.testing.assert_close(logits.logsumexp(-1), own.logsumexp(-1))
        torch.testing.assert_close(weights, best.values / best.values.sum(-1, keepdim=True))
        assert torch.equal(indices, best.indices)
        # what the model's balance loss is of
        torch.testing.assert_close(result.router_logits[layer].view(-1, 4), logits)


@pytest.mark.parametrize("kind", MODELS)
def test_attention_is_that_of_the_layer_before(kind):
    model = MODELS[kind]()
    model.set_attn_implementation("eager")
    given = inputs(kind)
    expected = model(**given, output_attentions=True)
    graphs = patch_router(model, "attention")
    seen = watch(model, "gate" if kind == "mixtral" else "router")
    model(**given)
    if kind == "mixtral":
        # the first layer's attention does not depend on any router
        name, attention, time = next(iter(graphs)), expected.attentions[0], 9
    else:
        name, attention, time = next(n for n in graphs if n.startswith("encoder")), expected.encoder_attentions[1], 9
    tokens, output = seen[name]
    gate = model.get_submodule(name)
    own = torch.nn.functional.linear(tokens, gate.weight if kind == "mixtral" else gate.classifier.weight)
    own = own.softmax(-1).view(2, time, 4)
    mixed = 0.5 * own + 0.5 * attention.mean(1) @ own
    logits = output[0] if kind == "mixtral" else output[2]
    torch.testing.assert_close(logits.softmax(-1).view(2, time, 4), mixed)


@pytest.mark.parametrize("graph", ["similarity", "attention", "uniform"])
def test_the_attention_that_is_recorded_leaves_the_model_as_it_was(graph):
    model = mixtral()
    given = inputs("mixtral")
    expected = model(**given).logits
    patch_router(model, graph, self_weight=1.0)
    torch.testing.assert_close(model(**given).logits, expected)
    assert not any("recorded_weights" in vars(module) for module in model.modules())


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("graph", ["similarity", "attention", "uniform"])
def test_padding_is_never_averaged_over(kind, graph):
    # room for all: Switch counts padded tokens against the capacity of experts
    model = MODELS[kind](**({"expert_capacity": 99} if kind == "switch" else {}))
    patch_router(model, graph)
    given = inputs(kind)
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[1, 5:] = 0
    changed = dict(given)
    changed["input_ids"] = torch.where(mask.bool(), given["input_ids"], 3 + (given["input_ids"] + 5) % 37)
    before, after = (model(**each, attention_mask=mask).logits for each in (given, changed))
    counts = mask.bool() if kind == "mixtral" else torch.ones(2, 7, dtype=torch.bool)
    torch.testing.assert_close(after[counts], before[counts])


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("graph", ["similarity", "attention", "uniform"])
def test_a_decoder_does_not_look_ahead(kind, graph):
    model = MODELS[kind](**({"expert_capacity": 99} if kind == "switch" else {}))
    patch_router(model, graph)
    given = inputs(kind)
    name = "input_ids" if kind == "mixtral" else "decoder_input_ids"
    changed = given | {name: torch.cat([given[name][:, :4], torch.randint(3, 40, given[name][:, 4:].shape)], dim=1)}
    torch.testing.assert_close(model(**changed).logits[:, :4], model(**given).logits[:, :4])


def test_a_copy_has_hooks_of_its_own():
    model = mixtral()
    patch_router(model, "similarity")
    copied = copy.deepcopy(model)
    given = inputs("mixtral")
    expected = model(**given).logits
    with torch.no_grad():
        for name, parameter in copied.named_parameters():
            if "token_graph" in name:
                parameter.zero_()
    assert (copied(**given).logits - expected).abs().max() > 1e-4
    torch.testing.assert_close(model(**given).logits, expected)


def test_it_generates_without_a_cache_and_says_so():
    model = mixtral()
    patch_router(model, "similarity")
    prompt = torch.randint(3, 40, (1, 4))
    assert model.generate(prompt, max_new_tokens=3, min_new_tokens=3, do_sample=False, use_cache=False).shape == (1, 7)
    with pytest.raises(ValueError, match="use_cache=False"):
        model.generate(prompt, max_new_tokens=3, min_new_tokens=3, do_sample=False)


def test_what_cannot_be_patched_is_refused():
    with pytest.raises(ValueError, match="Linear has no router"):
        patch_router(torch.nn.Linear(2, 2))
    model = mixtral()
    patch_router(model)
    with pytest.raises(ValueError, match=r"'model\.layers\.0\.mlp\.gate' was patched already"):
        patch_router(model, "uniform")
    with pytest.raises(ValueError, match="got 'cycle'"):
        patch_router(mixtral(), "cycle")
    with pytest.raises(ValueError, match=r"\[batch, time\]; got \[2, 1, 9, 9\]"):
        model(**inputs("mixtral"), attention_mask=torch.ones(2, 1, 9, 9))
