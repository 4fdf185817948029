"""The demonstration: real guests, a real broker and the agent, told line by line or drawn on a terminal."""
