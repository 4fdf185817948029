"""What the agent publishes and what it can be asked, whatever carries it."""
