"""How stages compute: the DeepSpeed training loop, log-probs, generation, checkpoint and resume."""
