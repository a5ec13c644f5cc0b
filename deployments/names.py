"""The names by which the parts of a server find each other on a Ray cluster. A cluster has only one such server."""

APPLICATION = "ditserve"
"""The Serve application, in which the state actor finds the engine."""

STATE_ACTOR = "ditserve-state"
"""The state actor."""

NAMESPACE = "ditserve"
"""Where Ray looks the state actor's name up."""
