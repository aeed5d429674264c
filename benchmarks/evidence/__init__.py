"""What the main objectives do where the truth is known or can be measured: python -m benchmarks.evidence."""
