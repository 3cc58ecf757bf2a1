"""One optimizer for every parameter: Newton-Schulz, routing, update rules, schedules, clipping."""
