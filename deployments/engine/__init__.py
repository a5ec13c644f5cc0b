"""The engine: one replica is a gang of ranks that compute, and the queue of jobs in front of them."""
