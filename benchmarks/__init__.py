"""Speed, memory and quality, measured side by side in one run."""
