"""The machines that train: one rank each."""
