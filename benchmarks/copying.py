"""Write text of which three quarters are copies, to see which mixers can copy from further back in their window.

    python benchmarks/copying.py copying            # the folder copying/ with train.txt, valid.txt and test.txt
    e88 study run studies/copying.toml --scale small --data copying

Pieces of 4 to 12 random letters of 16; each is new with probability 1/4, else one of the last one to six. A model that
copies nothing cannot do better than 4 bits a letter. The text is the same wherever it is written.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path

LETTERS = b"abcdefghijklmnop"
SIZES = {"train": 8_000_000, "valid": 400_000, "test": 200_000}


def text(size: int, rng: random.Random) -> bytes:
    """At least `size` bytes."""
    out = bytearray()
    recent: list[bytes] = []
    while len(out) < size:
        if recent and rng.random() < 0.75:
            piece = rng.choice(recent)
        else:
            piece = bytes(rng.choice(LETTERS) for _ in range(rng.randint(4, 12)))
            recent = (recent + [piece])[-rng.randint(1, 6) :]
        out += piece
    return bytes(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="folder to write")
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    rng = random.Random(7)
    for name, size in SIZES.items():
        (out / f"{name}.txt").write_bytes(text(size, rng))


if __name__ == "__main__":
    main()
