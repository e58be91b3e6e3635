"""ScratchLM for `transformers`, without ScratchLM: two files that are copied beside exported weights.

``AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)`` then opens any architecture.
"""
