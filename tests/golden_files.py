"""Which golden files there are and how they are made again.

`python tests/golden_files.py` writes them all; it needs PyTorch, and the files change in their last
digits with its version. The checkpoints are written anew from a seed and thrown away.
"""

import dataclasses
import sys
import tempfile
from pathlib import Path

from sizes import TINY

from gpt_oss_jax import cli
from gpt_oss_jax.checkpoint import synthetic
from gpt_oss_jax.config import Config

FOLDER = Path(__file__).parent / "golden"
# The released window, and a text that is longer.
WINDOW_128 = dataclasses.replace(
    TINY, num_hidden_layers=2, hidden_size=64, intermediate_size=96, sliding_window=128
)


@dataclasses.dataclass(frozen=True)
class GoldenFile:
    """One file, of the random checkpoint of `config` with seed 0."""

    config: Config
    reference: str
    length: int

    @property
    def path(self) -> Path:
        return FOLDER / f"window-{self.config.sliding_window}-{self.reference}.npz"


# Each reference shows ops that the other keeps to itself.
GOLDEN_FILES = [
    GoldenFile(config, reference, length)
    for config, length in ((TINY, 40), (WINDOW_128, 160))
    for reference in ("official", "hf")
]


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    for file in GOLDEN_FILES:
        with tempfile.TemporaryDirectory() as folder:
            checkpoint = str(synthetic.write(file.config, Path(folder) / "checkpoint"))
            arguments = ["--reference", file.reference, "--length", str(file.length)]
            if code := cli.main(["parity", checkpoint, *arguments, "--save", str(file.path)]):
                sys.exit(code)


if __name__ == "__main__":
    main()
