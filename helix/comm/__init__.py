"""The mesh and its collectives: differentiable, counted, small ones through shared memory."""
