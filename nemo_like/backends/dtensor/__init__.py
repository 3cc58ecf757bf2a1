"""FSDP2 and tensor parallelism on Hugging Face causal language models."""
