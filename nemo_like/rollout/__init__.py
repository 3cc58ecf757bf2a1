"""Engines that complete prompts, and what turns their completions into training data."""
