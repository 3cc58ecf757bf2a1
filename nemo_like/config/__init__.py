"""The validated configuration tree. No torch, ray or vllm: a typo is reported in a second."""
