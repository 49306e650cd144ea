"""What the command line runs: demo, pictures, samples of trained models."""
