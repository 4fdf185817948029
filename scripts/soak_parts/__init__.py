"""A soak: faults at random over simulated and real VMs, a broker and the agent, and the checks meanwhile."""
