"""One run from its configuration to results.json and a checkpoint; resumable."""
