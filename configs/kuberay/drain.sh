#!/bin/bash
# A worker pod's preStop hook: no new jobs for this node, and the pod stays until the jobs it has are done.
# Kubernetes ends it regardless after terminationGracePeriodSeconds, which Ray is told as the node's deadline.
set -euo pipefail

DEADLINE_SECONDS=7800

# Serve starts the node's replicas elsewhere and stops those here once their requests are answered.
ray drain-node --reason DRAIN_NODE_REASON_PREEMPTION --reason-message "the pod is being terminated" \
  --deadline-remaining-seconds "$DEADLINE_SECONDS"

while grep --quiet --text --no-messages '^ray::ServeReplica' /proc/[0-9]*/cmdline; do
  sleep 2
done
