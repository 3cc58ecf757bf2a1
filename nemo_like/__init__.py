"""LLM post-training that one person can read: SFT, GRPO and DAPO.

Muon is as easy as AdamW, on every layout.
"""

__version__ = "0.1.0"
