"""The commands of `elastic-hf`, one file each."""
