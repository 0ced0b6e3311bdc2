"""Claim: `import detrkit` takes at most 0.3 s beyond `import torch`, and `detrkit --help` 0.3 s in all, without torch.

    python benchmarks/start.py [--rounds 9]

Each is a new process; sides in turning order, seconds of the wall clock and of processor time, medians. The files are
in the system's cache from a first round that does not count.
"""

from __future__ import annotations

import resource
import statistics
import subprocess
import sys
import time

from _report import machine, parser, show

COMMANDS = {
    "import torch": ("-c", "import torch"),
    "import torch, detrkit": ("-c", "import torch, detrkit"),
    "and its functions": ("-c", "import torch, detrkit; detrkit.load, detrkit.train"),
    "detrkit --help": ("-m", "detrkit", "--help"),
    "the same, and torch": ("-c", "import detrkit.cli, sys; sys.exit('torch' in sys.modules)"),
}


def run(arguments: tuple[str, ...]) -> tuple[float, float]:
    """Seconds of the wall clock and of processor time of a new Python."""
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL)
    wall, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    return wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--rounds", type=int, default=9)
    arguments = options.parse_args()
    rounds = 2 if arguments.short else arguments.rounds
    run(COMMANDS["the same, and torch"])  # fails where the command line loads torch
    names = list(COMMANDS)[:-1]
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    for number in range(rounds + 1):
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            found = run(COMMANDS[name])
            if number:
                times[name].append(found)
    medians = {
        name: dict(zip(("wall", "processor"), map(statistics.median, zip(*values, strict=True)), strict=True))
        for name, values in times.items()
    }
    result = {
        "seconds (of the processor)": {
            name: f"{of['wall']:.2f} ({of['processor']:.2f})" for name, of in medians.items()
        },
        "rounds": rounds,
        "machine": machine(("detrkit", "torch")),
    }
    show({**result, "medians": medians, "all": times} if arguments.json else result, arguments.json)


if __name__ == "__main__":
    main()
