"""From untyped input to a typed batch: `enforce` and the rules of each mode."""
