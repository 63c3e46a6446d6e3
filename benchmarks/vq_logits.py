"""Output layers with a codebook beside the dense layer, a low-rank layer and torch's adaptive softmax.

    python -m benchmarks.vq_logits [--threads N] [--seconds S] [--vocabularies V ...] [--widths D ...] [--codes K]

The logits of the codes and all logits, which are scattered from them, are timed apart: the latter must write a number a
token and position, whatever the codes. Best tokens and samples are found from the codes, here and from all logits in
the dense layer. Everything is compared with its definition before it is timed.
"""

from __future__ import annotations

import argparse
import gc
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from benchmarks._tables import Row, best_times, record
from postern.heads import AdaptiveSoftmaxHead, LowRankHead, SoftmaxHead, VQLogitsHead, head_cost, unigram_bias

VOCABULARIES = (50_257, 128_256, 256_000)
WIDTHS = (512, 1024, 2048, 4096)
BATCHES = (1, 32, 256)
DTYPES = (torch.float32, torch.bfloat16)
BEST = 20


def codebook(width: int, vocabulary: int, codes: int, dtype: torch.dtype, has_token_bias: bool) -> VQLogitsHead:
    mapping = torch.randint(codes, (vocabulary,))
    counts = 1e6 / torch.arange(1, vocabulary + 1)
    token_bias = unigram_bias(counts, mapping) if has_token_bias else None
    return VQLogitsHead(width, vocabulary, codes, mapping, token_bias=token_bias).to(dtype)


def check(head: VQLogitsHead, hidden: Tensor) -> None:
    """All logits against products with a matrix that has every token's vector."""
    hidden = hidden[:4].float()
    exact = VQLogitsHead(head.in_features, head.num_classes, head.num_codes, head.mapping, token_bias=head.token_bias)
    exact.load_state_dict(head.state_dict())
    rows, bias = head.codebook.weight[head.mapping].float(), head.codebook.bias[head.mapping].float()
    logits = nn.functional.linear(hidden, rows, bias if head.token_bias is None else bias + head.token_bias.float())
    torch.testing.assert_close(exact.logits(hidden), logits, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(
        exact.topk(hidden, BEST)[0], logits.log_softmax(-1).topk(BEST).values, rtol=1e-3, atol=1e-3
    )
    target = torch.arange(len(hidden))
    loss = nn.functional.cross_entropy(logits, target)
    torch.testing.assert_close(exact.loss(hidden, target), loss, rtol=1e-3, atol=1e-3)


@torch.no_grad()
def inference(arguments: argparse.Namespace) -> Iterator[Row]:
    """All logits, logits of the codes, best tokens and samples, against the dense layer's."""
    for vocabulary in arguments.vocabularies:
        for width in arguments.widths:
            for dtype in DTYPES:
                if vocabulary * width * dtype.itemsize > arguments.gigabytes * 2**30:
                    continue
                dense = SoftmaxHead(2, 2)
                dense.linear = nn.Linear(width, vocabulary, dtype=dtype)
                dense.in_features, dense.num_classes = width, vocabulary
                head, biased = (codebook(width, vocabulary, arguments.codes, dtype, biased) for biased in (False, True))
                for batch in BATCHES:
                    hidden = torch.randn(batch, width, dtype=dtype)
                    check(head, hidden)
                    check(biased, hidden)
                    times = best_times(
                        {
                            "dense": "dense.logits(hidden)",
                            "scattered": "head.logits(hidden)",
                            "scattered, biased": "biased.logits(hidden)",
                            "codes": "head.code_logits(hidden)",
                            "dense best": f"dense.logits(hidden).topk({BEST})",
                            "best": f"biased.topk(hidden, {BEST})",
                            "dense sample": "torch.multinomial(dense.logits(hidden).float().softmax(-1), 1)",
                            "sample": "biased.sample(hidden)",
                        },
                        arguments.seconds,
                        {"dense": dense, "head": head, "biased": biased, "hidden": hidden, "torch": torch},
                        rounds=3,
                    )
                    yield {
                        "tokens": f"{vocabulary:,}",
                        "features": width,
                        "type": str(dtype).removeprefix("torch."),
                        "positions": batch,
                        "dense, ms": 1e3 * times["dense"],
                        "all logits": times["dense"] / times["scattered"],
                        "all logits, token biases": times["dense"] / times["scattered, biased"],
                        "logits of the codes": times["dense"] / times["codes"],
                        f"{BEST} best tokens": times["dense best"] / times["best"],
                        "a sample": times["dense sample"] / times["sample"],
                    }
                del dense, head, biased
                gc.collect()


def rivals(arguments: argparse.Namespace, vocabulary: int = 50_257, width: int = 768, batch: int = 256) -> list[Row]:
    """Training and inference at equal bytes."""
    counts = 1e6 / torch.arange(1, vocabulary + 1)
    vq = codebook(width, vocabulary, arguments.codes, torch.float32, has_token_bias=True)
    budget = head_cost(width, vocabulary, arguments.codes, has_token_bias=True).bytes
    numbers = budget // 4
    tail = max(1, numbers // (2 * vocabulary))
    cutoff = (numbers - width * (1 + tail) - tail * vocabulary) // (width - tail)
    heads = {
        "dense": SoftmaxHead(width, vocabulary),
        "codebook and token biases": vq,
        "low rank": LowRankHead(width, vocabulary, (numbers - vocabulary) // (width + vocabulary)),
        "adaptive softmax": AdaptiveSoftmaxHead(width, counts, (cutoff,), width / tail),
    }
    hidden = torch.randn(batch, width, requires_grad=True)
    target = torch.multinomial(counts, batch, replacement=True)
    statements = {}
    for index in range(len(heads)):
        statements[f"logits {index}"] = f"no_grad(heads[{index}].logits)(hidden)"
        statements[f"loss {index}"] = f"torch.autograd.backward(heads[{index}].loss(hidden, target))"
    names = {"heads": [*heads.values()], "hidden": hidden, "target": target, "torch": torch, "no_grad": torch.no_grad()}
    times = best_times(statements, 4 * arguments.seconds, names, rounds=3)
    rows: list[Row] = []
    for index, (name, head) in enumerate(heads.items()):
        size = budget if head is vq else 4 * sum(parameter.numel() for parameter in head.parameters())
        rows.append(
            {
                "layer": name,
                "MiB": size / 2**20,
                "all logits": times["logits 0"] / times[f"logits {index}"],
                "loss and gradients": times["loss 0"] / times[f"loss {index}"],
                "kept for gradients, MiB": kept_for_gradients(head, hidden, target) / 2**20,
            }
        )
    return rows


def kept_for_gradients(head: nn.Module, hidden: Tensor, target: Tensor) -> int:
    """Bytes of what the loss keeps for its backward pass, parameters and inputs apart."""
    mine = {tensor.data_ptr() for tensor in (hidden, target, *head.parameters(), *head.buffers())}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in mine:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = head.loss(hidden, target)
    del loss
    return sum(kept.values())


def sizes(vocabularies: Sequence[int], widths: Sequence[int]) -> list[Row]:
    rows: list[Row] = []
    for vocabulary in vocabularies:
        for width in (widths[0], widths[-1]):
            dense = head_cost(width, vocabulary)
            for codes in (512, 1024, 2048, 4096):
                plain = head_cost(width, vocabulary, codes)
                biased = head_cost(width, vocabulary, codes, has_token_bias=True)
                rows.append(
                    {
                        "tokens": f"{vocabulary:,}",
                        "features": width,
                        "codes": f"{codes:,}",
                        "parameters": f"{plain.parameters:,}",
                        "table, KiB": plain.mapping_bits / 8 / 2**10,
                        "saved, %": f"{100 * (1 - plain.bytes / dense.bytes):.2f}",
                        "saved with token biases, %": f"{100 * (1 - biased.bytes / dense.bytes):.2f}",
                    }
                )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seconds", type=float, default=1.0, help="how long to time each row of a table")
    parser.add_argument("--vocabularies", type=int, nargs="+", default=list(VOCABULARIES))
    parser.add_argument("--widths", type=int, nargs="+", default=list(WIDTHS))
    parser.add_argument("--codes", type=int, default=2048)
    parser.add_argument("--gigabytes", type=float, default=2.0, help="leave out larger dense layers")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    at_equal_bytes = (
        "Times as fast as the dense layer, at equal bytes: 256 positions, 768 features, 50,257 tokens, float32"
    )
    tables: dict[str, Sequence[Row]] = {
        f"Times as fast as the dense layer, {arguments.codes:,} codes": list(inference(arguments)),
        at_equal_bytes: rivals(arguments),
        "Memory in float32, the table in the fewest bits": sizes(arguments.vocabularies, arguments.widths),
    }
    record("vq_logits", "Output layers for large vocabularies", tables)


if __name__ == "__main__":
    main()
