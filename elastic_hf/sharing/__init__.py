"""From a folder of results to a card and to the Hub."""
