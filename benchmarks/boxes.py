"""Soft-NMS beside the plain Python loop of the paper and the NumPy loop that is usually copied.

    python -m benchmarks.boxes [--sizes 100 500 2000] [--repeats 7]

Boxes come as a detector emits them: twenty around each object. Times are medians over the repeats, on one thread;
the loops run once where they take more than half a second. All results are compared before anything is timed.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch

from postern.boxes import Method, _kernel, soft_nms, soft_nms_reference

METHODS: tuple[Method, ...] = ("gaussian", "linear", "hard")


def detector_boxes(n: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    objects = rng.uniform(0, 1000, (n // 20 + 1, 2))
    centre = objects[rng.integers(0, len(objects), n)] + rng.normal(0, 10, (n, 2))
    half = rng.uniform(20, 60, (n, 2))
    return np.concatenate([centre - half, centre + half], axis=1), rng.uniform(0, 1, n)


def plain_loop(boxes: np.ndarray, scores: np.ndarray, method: Method) -> list[int]:
    return soft_nms_reference(boxes.tolist(), scores.tolist(), method)[0]


def numpy_loop(boxes: np.ndarray, scores: np.ndarray, method: Method) -> list[int]:
    """A loop over selections, with the overlaps of one selection as vectors."""
    remaining, area = scores.copy(), (boxes[:, 2:] - boxes[:, :2]).prod(1)
    index, keep = np.arange(len(scores)), []
    while len(index):
        best = remaining[index].argmax()
        m, index = index[best], np.delete(index, best)
        keep.append(int(m))
        lowest, highest = np.maximum(boxes[m, :2], boxes[index, :2]), np.minimum(boxes[m, 2:], boxes[index, 2:])
        intersection = (highest - lowest).clip(0).prod(1)
        iou = intersection / (area[m] + area[index] - intersection)
        if method == "gaussian":
            remaining[index] *= np.exp(-(iou**2) / 0.5)
        else:
            remaining[index] *= np.where(iou <= 0.3, 1, 1 - iou if method == "linear" else 0)
        index = index[remaining[index] >= 1e-3]
    return keep


def through_torch(boxes: np.ndarray, scores: np.ndarray, method: Method) -> list[int]:
    available, _kernel.is_available = _kernel.is_available, lambda: False
    try:
        return [int(k) for k in soft_nms(boxes, scores, method)[0]]
    finally:
        _kernel.is_available = available


def compiled(boxes: np.ndarray, scores: np.ndarray, method: Method) -> list[int]:
    return [int(k) for k in soft_nms(boxes, scores, method)[0]]


def median_ms(function: Callable[[], object], repeats: int) -> float:
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
        if times[-1] > 0.5:
            break
    return statistics.median(times) * 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[100, 500, 2000, 5000])
    parser.add_argument("--repeats", type=int, default=7)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    ways = {"plain loop": plain_loop, "NumPy loop": numpy_loop, "postern, torch": through_torch}
    if _kernel.is_available():
        ways["postern, compiled"] = compiled
    print(f"{'boxes':>6} {'method':9}" + "".join(f"{name + ' ms':>21}" for name in ways) + f"{'plain / postern':>17}")
    for n in arguments.sizes:
        boxes, scores = detector_boxes(n)
        for method in METHODS:
            results = [way(boxes, scores, method) for way in ways.values()]
            assert all(result == results[0] for result in results), f"results differ: {n} boxes, {method}"
            times = [median_ms(lambda: way(boxes, scores, method), arguments.repeats) for way in ways.values()]  # noqa: B023
            print(f"{n:6} {method:9}" + "".join(f"{ms:21.2f}" for ms in times) + f"{times[0] / times[-1]:17.0f}")


if __name__ == "__main__":
    main()
