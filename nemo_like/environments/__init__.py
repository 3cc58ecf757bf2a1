"""What judges answers. No environment executes code that a model wrote."""
