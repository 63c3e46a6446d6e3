import pytest
import torch

from postern.data.algorithmic import modular_arithmetic, sparse_parity


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(
    ("operation", "answer"),
    [("add", lambda a, b: a + b), ("subtract", lambda a, b: a - b), ("multiply", lambda a, b: a * b)],
)
def test_tokens_are_every_pair_once_with_its_answer(operation, answer):
    split = modular_arithmetic(11, operation, 0.4, encoding="token", generator=seeded())
    inputs = torch.cat([split.train_inputs, split.test_inputs]).tolist()
    target = torch.cat([split.train_target, split.test_target]).tolist()
    assert len(split.train_inputs) == len(split.train_target) == 48
    assert sorted(map(tuple, inputs)) == [(a, b) for a in range(11) for b in range(11)]
    assert target == [answer(a, b) % 11 for a, b in inputs]
    assert split.num_classes == 11


def test_encodings_are_of_the_same_pairs():
    tokens = modular_arithmetic(13, "subtract", 0.5, encoding="token", generator=seeded())
    one_hot = modular_arithmetic(13, "subtract", 0.5, generator=seeded())
    binary = modular_arithmetic(13, "subtract", 0.5, encoding="binary", generator=seeded())
    assert one_hot.train_inputs.shape == (84, 26)
    assert binary.train_inputs.shape == (84, 8)
    torch.testing.assert_close(one_hot.train_inputs.view(-1, 2, 13).argmax(-1), tokens.train_inputs)
    assert (one_hot.test_inputs.view(-1, 2, 13).sum(-1) == 1).all()
    for side in ("train", "test"):
        pairs, codes = getattr(tokens, f"{side}_inputs"), getattr(binary, f"{side}_inputs").view(-1, 2, 4)
        assert set(codes.unique().tolist()) == {0.0, 1.0}
        code_of = {}
        for number, code in zip(pairs.flatten().tolist(), codes.flatten(0, 1).tolist(), strict=True):
            assert code_of.setdefault(number, code) == code
        assert len({tuple(code) for code in code_of.values()}) == len(code_of) == 13
    assert modular_arithmetic(113, "add", 0.4, encoding="binary").train_inputs.shape[1] == 14


def test_seeds():
    first, second, other = (modular_arithmetic(7, "add", 0.5, generator=seeded(seed)) for seed in (1, 1, 2))
    torch.testing.assert_close(first.train_inputs, second.train_inputs, rtol=0, atol=0)
    assert not torch.equal(first.train_inputs, other.train_inputs)


@pytest.mark.parametrize("num_bits", [6, 30, 62])
def test_parity(num_bits):
    split = sparse_parity(num_bits, 3, 60, generator=seeded())
    inputs = torch.cat([split.train_inputs, split.test_inputs])
    target = torch.cat([split.train_target, split.test_target])
    assert inputs.shape == (60, num_bits)
    assert len(split.train_inputs) == 30
    assert len(inputs.unique(dim=0)) == 60
    assert target.tolist() == [sum(bits[:3]) % 2 for bits in inputs.long().tolist()]
    assert split.num_classes == 2


def test_parity_strings_are_uniform():
    inputs = sparse_parity(40, 2, 20_000, generator=seeded()).train_inputs
    assert (inputs.mean(0) - 0.5).abs().max() < 5 * 0.5 / 100
    assert len(sparse_parity(4, 2, 16, generator=seeded()).train_inputs) == 8


def test_moves():
    split = sparse_parity(5, 2, 10).to("meta")
    assert {split.train_inputs.device.type, split.test_target.device.type} == {"meta"}


def test_bad_input():
    with pytest.raises(ValueError, match="at least 2, got 1"):
        modular_arithmetic(1, "add", 0.5)
    with pytest.raises(ValueError, match="'divide'"):
        modular_arithmetic(5, "divide", 0.5)
    with pytest.raises(ValueError, match="'gray'"):
        modular_arithmetic(5, "add", 0.5, encoding="gray")
    for fraction in (0.0, 1.0, 0.01, -0.5, float("nan")):
        with pytest.raises(ValueError, match="both sides"):
            modular_arithmetic(5, "add", fraction)
    with pytest.raises(ValueError, match="num_parity_bits=4 and num_bits=3"):
        sparse_parity(3, 4, 5)
    with pytest.raises(ValueError, match="8 strings"):
        sparse_parity(3, 2, 9)
