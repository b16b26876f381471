"""Users' states behind a service: where they are kept, how they are read for many users at once."""
