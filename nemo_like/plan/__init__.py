"""What a run would need and do, found on a laptop before anything is started."""
