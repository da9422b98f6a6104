"""Finding out which adapter is better: the arena, its votes, sets of prompts, and which adapter answers what."""
