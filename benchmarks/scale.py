"""Writes the table of docs/scale.md: python benchmarks/scale.py

Jobs too large for one machine, as `domerge-fast plan` costs them, on 64 GPUs that make 100 TFLOP/s
each with float32 sums, and a file system that reads and writes 40 GB/s. Nothing is run.
"""

from __future__ import annotations

from pathlib import Path

from domerge_fast.costs import Shape, Workers, costs

PAGE = Path(__file__).parent.parent / "docs" / "scale.md"
BEGIN, END = "<!-- jobs -->\n", "<!-- end jobs -->\n"
GPUS = Workers(64, 100e12, 40e9, 40e9)


def decoder(layers: int, hidden: int, key_value: int, feed_forward: int, ranks: tuple[int, ...]):
    """The seven projections of every layer."""
    wide = [(hidden, hidden), (key_value, hidden), (key_value, hidden), (hidden, hidden)]
    wide += [(feed_forward, hidden), (feed_forward, hidden), (hidden, feed_forward)]
    return [Shape(m, n, ranks) for _ in range(layers) for m, n in wide]


def jobs() -> dict[str, list[Shape]]:
    """By what they are called."""
    experts = [(768, 2048), (768, 2048), (2048, 768)]
    queries = [Shape(4096, 4096, (8,) * 1000), Shape(1024, 4096, (8,) * 1000)]
    return {
        "405B, all projections, 200 adapters of rank 16": decoder(
            126, 16384, 1024, 53248, (16,) * 200
        ),
        "70B, all projections, 200 adapters of rank 16": decoder(
            80, 8192, 1024, 28672, (16,) * 200
        ),
        "18,432 experts of a 30B model, 200 adapters of rank 8": [
            Shape(m, n, (8,) * 200, count=48 * 128) for m, n in experts
        ],
        "8B, q and v, 1000 adapters of rank 8": queries * 32,
        "the same, 10,000 adapters, in batches by one GPU": [
            Shape(x.m, x.n, (8,) * 10_000) for x in queries * 32
        ],
    }


def table() -> str:
    head = ["job", "read", "written", "PFLOP", "computing", "reading and writing", "ends in"]
    head += ["memory a GPU", "into the base"]
    rows = [head, ["---"] * len(head)]
    for name, modules in jobs().items():
        found, based = costs(modules, GPUS), costs(modules, GPUS, into_base=True)
        rows.append(
            [
                *(name, f"{found.read / 1e9:.1f} GB", f"{found.written / 1e9:.1f} GB"),
                *(f"{found.flops / 1e15:.3f}", f"{found.compute:.2f} s", f"{found.transfer:.1f} s"),
                *(f"{found.seconds:.1f} s", f"{found.memory / 1e9:.1f} GB"),
                f"{based.seconds:.1f} s",
            ]
        )
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def page(text: str) -> str:
    """The page with this table in it."""
    before, rest = text.split(BEGIN)
    return before + BEGIN + table() + END + rest.split(END)[1]


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text("utf-8")), "utf-8")
