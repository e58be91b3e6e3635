"""ScratchLM: a language model from raw bytes to a chat, every part written here.

The rooms, left to right: ``tokenizer`` → ``data`` → ``model`` → ``train`` → ``generate`` / ``evaluate`` →
``interop``; ``kernels``, ``optim`` and ``config`` serve all of them. Importing this package imports none of them:
``import scratchlm`` costs nothing, and ``scratchlm --help`` does not wait for torch.
"""

__version__ = "0.1.0"
