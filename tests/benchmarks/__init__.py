"""Speed, measured side by side in one run; ratios are what counts. Run: make bench."""
