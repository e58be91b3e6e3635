"""Text ↔ ids: byte-level BPE, trained and applied.

from scratchlm.tokenizer import Tokenizer, train_bpe
tokenizer = train_bpe("corpus.txt", vocab_size=4096)
ids = tokenizer.encode_array("Hello, it's 2026")
"""

from scratchlm.tokenizer.patterns import PATTERNS
from scratchlm.tokenizer.tokenizer import Tokenizer
from scratchlm.tokenizer.training import train_bpe

__all__ = ["PATTERNS", "Tokenizer", "train_bpe"]
