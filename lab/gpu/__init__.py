"""What a GPU shows in eight minutes: whether the framework is right on it, and how fast."""
