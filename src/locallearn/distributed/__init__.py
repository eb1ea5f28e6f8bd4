"""Training spread over processes: layers in parallel, data in parallel, or both.

It has no arithmetic of its own: what a process computes is what the engine would, in one."""
