"""What a run shows of itself: metrics, timing, console, sinks and the report."""
