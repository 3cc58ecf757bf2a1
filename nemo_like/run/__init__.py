"""The door: from a configuration to a run. Only this package knows all the others."""
