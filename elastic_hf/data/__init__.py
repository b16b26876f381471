"""From rows to batches. Imports no model."""
