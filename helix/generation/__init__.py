"""From a prompt to a text: running transformers' `generate` on ranks, streaming it, and what it cost."""
