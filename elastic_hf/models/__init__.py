"""What is copied into a model's repository on the Hub: all that loads and uses a model away from this package."""
