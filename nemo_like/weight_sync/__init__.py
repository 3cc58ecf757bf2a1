"""What makes sure that an engine samples from the weights it was sent, and from no others."""
