"""The validated configuration tree. Imports neither torch nor ray nor vllm: a typo is reported in a second."""
