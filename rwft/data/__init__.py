"""From rows in files to batches: adapters, credit assignment, tokenisation, log-probabilities, batching."""
