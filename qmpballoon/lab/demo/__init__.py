"""The demonstration: real guests, a real broker and the agent, shown line by line or drawn on a terminal."""
