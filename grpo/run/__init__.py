"""The life of a run: what it loads, shows, saves, and how it goes on after it was stopped."""
