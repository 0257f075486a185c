"""Evidence of what a TEE runs, and its judgement by a policy that a person can read. Without torch or network."""
