"""What `shohin.passes.prune` is made of: which weights, how they are ranked, how many are kept."""
