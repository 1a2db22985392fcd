"""What a run would move, compute, hold and take, without the machine that it needs: one rank's model code, traced.

The model is built and called by the code that a real run calls, on tensors that have a shape and no numbers (torch's
meta device) and a process group whose collectives do nothing (torch's backend "fake"), in one process.
"""
