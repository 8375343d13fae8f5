"""Parts of the passes that make weights ternary."""
