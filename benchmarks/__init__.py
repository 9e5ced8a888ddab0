"""What measures speed and memory. RESULTS.md has the figures, with hardware, commit and command."""
