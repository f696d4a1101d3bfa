"""All attacks, one after the other, and how they ended."""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

from . import faults, interrupts, mutants, together

STAGES = {
    "damaged files": (mutants.attack, 2100),
    "failing calls": (faults.attack, 200),
    "kills": (interrupts.kills, 100),
    "kills of several": (together.kills, 60),
    "Ctrl-C": (interrupts.interrupts, 52),
    "two writers": (interrupts.writers, 40),
}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m attack", description=__doc__)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--share", type=float, default=1.0, help="of the usual number of cases")
    parser.add_argument("--stage", choices=STAGES, action="append", help="only these")
    args = parser.parse_args()
    findings: list[str] = []
    for name, (attack, count) in STAGES.items():
        if args.stage and name not in args.stage:
            continue
        started = time.monotonic()
        with tempfile.TemporaryDirectory(prefix="attack-") as folder:
            tally = attack(Path(folder).resolve(), args.seed, max(1, int(args.share * count)))
        seconds = time.monotonic() - started
        endings = ", ".join(f"{n} {ending}" for ending, n in tally.endings.most_common())
        print(f"{name}: {sum(tally.endings.values())} in {seconds:.0f} s: {endings}", flush=True)
        findings += tally.findings
    for finding in findings:
        print(f"FINDING {finding}")
    print(f"seed {args.seed}: {len(findings)} findings")
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main())
