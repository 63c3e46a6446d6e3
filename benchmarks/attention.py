"""All benchmarks of attention, one after the other, each in a process of its own.

    python -m benchmarks.attention [NAME ...] [--device cuda] [--threads N] [--seconds S]

On a GPU the sizes are those of large models; see ``ON_A_GPU``. A benchmark that fails does not stop the others.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence

NAMES = (
    "seer_attention",
    "flashdecoding",
    "lightning_attention",
    "gated_attention",
    "linear_attention",
    "in_context_attention",
)
ON_A_GPU: Mapping[str, Sequence[str]] = {
    "seer_attention": ["--heads=32", "--head-dim=128", "--tokens", "8192", "16384", "32768", "65536", "131072"],
    "lightning_attention": ["--heads=32", "--head-dim=128", "--lengths", *(str(2**power) for power in range(10, 18))],
    "gated_attention": ["--width=4096", "--heads=32", "--kv-heads=8", "--tokens=4096"],
    "linear_attention": ["--width=1024", "--heads=16", "--causal", "--lengths", "1024", "4096", "16384"],
}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(NAMES)}; all by default")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--threads", type=int, help="by default as many as each has")
    parser.add_argument("--seconds", type=float, help="how long to time each case, by default as each has it")
    arguments = parser.parse_args(argv)
    unknown = sorted(set(arguments.names) - set(NAMES))
    if unknown:
        parser.error(f"unknown benchmark {', '.join(unknown)}; there are: {', '.join(NAMES)}")
    options = [f"--{name}={getattr(arguments, name)}" for name in ("threads", "seconds") if getattr(arguments, name)]
    failed = []
    for name in arguments.names or NAMES:
        command = [sys.executable, "-m", f"benchmarks.{name}", f"--device={arguments.device}", *options]
        start = time.monotonic()
        done = subprocess.run(command + list(ON_A_GPU.get(name, ()) if arguments.device == "cuda" else ()), check=False)
        print(f"{name}: {time.monotonic() - start:.0f} s\n", flush=True)
        if done.returncode:
            failed.append(name)
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
