"""Netdyno, a dynamometer for GPUs: how fast six image networks train here, in which memory, to which accuracy."""
