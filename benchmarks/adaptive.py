"""Inference that stops early, and convolutions that run chosen filters only, against the full networks.

    python -m benchmarks.adaptive [--device cuda] [--seconds S]

Weights are random. Exits are calibrated so that as many images leave at each; masks so that as many multiply-adds are
saved as the table says. The outputs of gathered and masked filters are compared before anything is timed: in double
precision, where rounding moves no log-odds across zero; and of the compiled kernel in float32, where it may for a few
images.
"""

from __future__ import annotations

import argparse
import copy
from functools import partial

import torch

from benchmarks._tables import Row, best_times, device_arguments, prepare, record
from postern.adaptive import EarlyExitModel, MaxProbExit, calibrate_thresholds, count_macs, geometric_exit_fractions
from postern.nets import ResNet
from postern.papers.fire_together import Serving, serving_networks
from postern.papers.jei_dnn import steep_gates

BATCHES = (1, 64)


def early_exits(device: torch.device, seconds: float) -> list[Row]:
    backbone = ResNet((2, 2, 2, 2), width=32).to(device).eval()
    names = [f"stages.{stage}.{block}" for stage in range(4) for block in range(2)][:-1]
    model = EarlyExitModel(backbone, names, 10, (32, 32, 64, 64, 128, 128, 256)).to(device).eval()
    images = torch.randn(64, 3, 32, 32, device=device)
    rows: list[Row] = []
    for ratio in (0.6, 1.0):
        thresholds = calibrate_thresholds(model(images), geometric_exit_fractions(8, ratio))
        policies = {"threshold": MaxProbExit(thresholds), "gates": steep_gates(thresholds, device)}
        for batch in BATCHES:
            batches = images.split(batch)
            calls = {name: f"[early(each, {name}) for each in batches]" for name in policies}
            names = {
                "early": lambda each, policy: model.forward_dynamic(each, policy=policy),
                "full": backbone,
                "batches": batches,
                **policies,
            }
            times = best_times({"full": "[full(each) for each in batches]", **calls}, seconds, names, device=device)
            macs = count_macs(partial(model.forward_dynamic, images, policy=policies["threshold"]))
            share = macs / count_macs(partial(backbone, images))
            rows.append(
                {"batch": f"{batch}", "share of multiply-adds": share}
                | {f"{name}, images/s": len(images) / value for name, value in times.items()}
                | {f"{name} / full": times["full"] / times[name] for name in policies}
            )
    return rows


def gathered_filters(device: torch.device, seconds: float) -> list[Row]:
    rows: list[Row] = []
    for reduction in (0.4, 0.6, 0.8):
        generator = torch.Generator().manual_seed(0)
        networks, images = serving_networks(Serving(reduction=reduction), device, generator)
        gathered = networks["gathered"]
        exact = copy.deepcopy(gathered).double()
        masked, found = (exact.set_execution(each)(images.double()) for each in ("masked", "gathered"))
        torch.testing.assert_close(masked, found)
        agrees = torch.isclose(gathered(images).double(), masked, rtol=1e-3, atol=1e-3).all(1)
        if agrees.double().mean() < 0.9:
            raise RuntimeError(f"{int((~agrees).sum())} of {len(images)} images get another output in float32")
        share = count_macs(partial(gathered, images)) / count_macs(partial(networks["dense"], images))
        for batch in BATCHES:
            names = {"batches": images.split(batch), **networks}
            calls = {name: f"[{name}(each) for each in batches]" for name in networks}
            times = best_times(calls, seconds, names, device=device)
            rows.append(
                {"batch": f"{batch}", "share of multiply-adds": share}
                | {f"{name}, images/s": len(images) / value for name, value in times.items()}
                | {f"{name} / dense": times["dense"] / times[name] for name in ("gathered", "static")}
            )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    device_arguments(parser)
    parser.add_argument("--seconds", type=float, default=8.0, help="how long to time each row of a table")
    arguments = parser.parse_args()
    device = prepare(arguments)
    torch.manual_seed(0)
    with torch.inference_mode():
        tables = {
            "Early exits of a ResNet-18 of width 32, images of 32 x 32 pixels": early_exits(device, arguments.seconds),
            "Gathered filters of stages 64, 128, 256, 256": gathered_filters(device, arguments.seconds),
        }
    record("adaptive", "Networks that compute less: samples a second against the full networks", tables, device)


if __name__ == "__main__":
    main()
