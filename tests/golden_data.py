"""Where the golden data of the reference implementations lies (see tests/golden/README.md)."""

from pathlib import Path

GOLDEN = Path(__file__).parent / "golden"
CHECKPOINTS = GOLDEN / "checkpoints"
TOKENIZER = GOLDEN / "tokenizer" / "paligemma_tokenizer.model"
