"""The agent: follows sockets, owns the facts of each VM, moves balloons by a policy, answers requests."""
